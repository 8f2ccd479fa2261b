"""Requests to stop: signals from a scheduler or a person, and a launcher that has died."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

STOPPED_EXIT_CODE = 143
# A worker whose launcher is gone leaves by itself after this long, even when its peers hang in a collective.
LAUNCHER_GRACE_SECONDS = 90.0


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag that the loop reads; a second signal exits at once.

    A watcher sets the flag too when the launcher that started this process is no longer its parent.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._parent = os.getppid()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        if "RANK" in os.environ:
            threading.Thread(target=self._watch_launcher, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(STOPPED_EXIT_CODE)
        self.requested = True
        self.reason = signal.Signals(number).name

    def _watch_launcher(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1.0)
        self.requested = True
        self.reason = "the launcher has died"
        time.sleep(LAUNCHER_GRACE_SECONDS)
        os._exit(STOPPED_EXIT_CODE)
