"""Requests to stop: signals from a scheduler or a person, and a launcher that has died."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from colossal_llama.utils.console import warn

STOPPED_EXIT_CODE = 143
# A worker whose launcher is gone leaves by itself after this long, even when its peers hang in a collective.
LAUNCHER_GRACE_SECONDS = 90.0
# torchrun (and so `colossalai run`) kills its workers this long after it has passed a signal on to them.
TORCHRUN_LIMIT_SECONDS = 30.0
# Another signal within this time is the same request: `pkill -f train.py`, systemd and batch systems signal
# torchrun and its workers at the same time, and torchrun passes on what it gets.
SAME_REQUEST_SECONDS = 2.0


def warn_of_launcher_limit(save_seconds: float) -> None:
    """Says so when a save takes so long that torchrun would kill it; a step may have to end before it."""
    if "TORCHELASTIC_RUN_ID" in os.environ and save_seconds > 0.8 * TORCHRUN_LIMIT_SECONDS:
        warn(
            f"a save takes {save_seconds:.0f} s, and torchrun kills its workers "
            f"{TORCHRUN_LIMIT_SECONDS:.0f} s after a SIGTERM: a run that is stopped through its launcher may "
            "have to continue from the last complete checkpoint. Save more often (--save_interval), or send "
            "SIGTERM to the train.py processes themselves"
        )


class StopRequest:
    """Turns SIGTERM, SIGINT and SIGHUP into a flag that the loop reads; a later second one exits at once.

    A watcher sets the flag too when the launcher that started this process is no longer its parent.
    """

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self._asked_at: float | None = None
        self._parent = os.getppid()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # Under nohup a closed terminal is to be ignored. torchrun passes SIGHUP on too.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if "RANK" in os.environ:
            threading.Thread(target=self._watch_launcher, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is not None and now - self._asked_at > SAME_REQUEST_SECONDS:
            os._exit(STOPPED_EXIT_CODE)
        self._asked_at = self._asked_at or now
        self.requested = True
        self.reason = signal.Signals(number).name

    def _watch_launcher(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(1.0)
        self.requested = True
        self.reason = "the launcher has died"
        time.sleep(LAUNCHER_GRACE_SECONDS)
        os._exit(STOPPED_EXIT_CODE)
