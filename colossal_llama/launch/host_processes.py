"""Finds and signals the processes of one run on all of its hosts, over ssh or on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Sequence

from colossal_llama.launch.messages import say_error

RETRY_SECONDS = 2.0
# Training that is just being started has no process yet: it is looked for this many times.
STOP_ATTEMPTS = 15
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10")

# What a command line has between `python` and `train.py`. Directories may have spaces in their names.
TRAINING = "-u "
TORCHRUN = "([^ ]*|/.*/)torchrun .*"


def process_pattern(before: str, save_dir: str) -> str:
    """A pattern of `pkill -f` for the processes of the run that have `before` in front of `train.py`.

    Its `save_dir` tells a run from all others. Everything but letters, digits and `_/-` is matched byte by
    byte, since hosts may have another locale than this process.
    """
    name = re.sub(rb"[^A-Za-z0-9_/-]", b".", os.fsencode(save_dir)).decode("ascii")
    return f"^([^ ]*|/.*/)python[^ ]* {before}train[.]py .*--save_dir[ =]{name}( |$)"


def signal_command(number: signal.Signals, before: str, save_dir: str) -> str:
    """A shell command that fails where there is no such process."""
    name = number.name.removeprefix("SIG")
    return f"env LC_ALL=C pkill -{name} -f -- '{process_pattern(before, save_dir)}'"


class HostProcesses:
    """The processes of one run.

    Args:
        hosts: names to reach over ssh; None for this machine alone.
        ssh_port: None for the port that ssh is configured for.
    """

    def __init__(self, hosts: Sequence[str] | None, ssh_port: str | None, save_dir: str) -> None:
        self._hosts, self._ssh_port, self._save_dir = hosts, ssh_port, save_dir
        self._threads: list[threading.Thread] = []
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def save_and_stop(self) -> None:
        """Signals the workers themselves: torchrun would kill them after 30 s.

        Where there are no workers yet, torchrun gets the signal; where there is neither, they may be about to
        start, and it tries again.
        """
        workers, torchrun = (self._command(signal.SIGTERM, before) for before in (TRAINING, TORCHRUN))
        self._run_on_every_host(f"{workers} || {torchrun}", STOP_ATTEMPTS)

    def end_launchers(self) -> None:
        """torchrun passes SIGTERM on, and kills workers that have not ended after 30 s."""
        self._run_on_every_host(self._command(signal.SIGTERM, TORCHRUN), 1)

    def kill(self) -> None:
        self._run_on_every_host(self._command(signal.SIGKILL, f"({TORCHRUN}|{TRAINING})"), 1)

    def close(self) -> None:
        """Ends what still runs of the calls above."""
        with self._lock:
            self._closed.set()
            for process in self._running:
                if process.returncode is not None:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        for thread in self._threads:
            thread.join()

    def _command(self, number: signal.Signals, before: str) -> str:
        return signal_command(number, before, self._save_dir)

    def _run_on_every_host(self, command: str, attempts: int) -> None:
        """Starts the shell command on all hosts at the same time, without waiting for it."""
        if self._hosts is None:
            commands = [["bash", "-c", command]]
        else:
            port = [] if self._ssh_port is None else ["-p", self._ssh_port]
            commands = [["ssh", *SSH_OPTIONS, *port, host, command] for host in self._hosts]
        for words in commands:
            thread = threading.Thread(target=self._run_until_success, args=(words, attempts), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _run_until_success(self, words: list[str], attempts: int) -> None:
        for _ in range(attempts - 1):
            if self._run(words) or self._closed.wait(RETRY_SECONDS):
                return
        self._run(words)

    def _run(self, words: list[str]) -> bool:
        with self._lock:
            if self._closed.is_set():
                return False
            try:
                # In a session of its own, it gets no Ctrl-C, and can be killed with what it has started.
                process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
            except OSError as error:
                say_error(f"{words[0]}: {error.strerror}")
                return False
            self._running.add(process)
        try:
            return process.wait() == 0
        finally:
            with self._lock:
                self._running.discard(process)
