"""Copies what `colossalai run` prints to standard output, and reports what the supervisor has to know.

    python -m colossal_llama.launch.relay 5

copies standard input until it ends, and writes its reports to file descriptor 5, one per line: `failed HOST`
when the processes of a host have ended with an error, `stopped` when training has saved and stopped.

It is a process of its own and ignores stop signals: when the supervisor is killed (`kill -9`), the launcher
can still print, and training continues.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import IO

STDOUT = 1
# `colossalai run` prints pieces of up to 1,000 bytes of each host's output in turn, so a message may begin or
# end within a line of another host. Either part of a message is enough here.
_STOPPED = re.compile(rb"Stopped by | after step .*; continue with ")
# Of "Error: failed to run COMMAND on HOST, is localhost: …".
_FAILED = re.compile(rb" on ([^ ]+), is localhost: ")


def find_report(line: bytes) -> bytes | None:
    """What a line of output means to the supervisor, if anything."""
    if failed := _FAILED.search(line):
        return b"failed " + failed[1]
    return b"stopped" if _STOPPED.search(line) else None


def copy_output(lines: Iterable[bytes], output: int, reports: int) -> None:
    """Copies `lines` to a file descriptor, and writes a report of those that have one to another.

    Where the reader is gone (a closed terminal, a supervisor that was killed), the rest is still read.
    """
    for line in lines:
        _write(output, line if line.endswith(b"\n") else line + b"\n")
        report = find_report(line)
        if report is not None:
            _write(reports, report + b"\n")


def _write(file: int, data: bytes) -> None:
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(file, data) :]


class OutputRelay:
    """The relay as a process; `input` is where a launcher writes."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "colossal_llama.launch.relay", str(writing)],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            start_new_session=True,  # out of reach of Ctrl-C
        )
        os.close(writing)
        self._reports = os.fdopen(reading, "rb")

    @property
    def input(self) -> IO[bytes]:
        return self._process.stdin

    def read_reports(self, on_failed_host: Callable[[str], None], on_stopped: Callable[[], None]) -> None:
        """Calls back for each report until the output has ended."""
        for line in self._reports:
            kind, _, host = line.rstrip(b"\n").partition(b" ")
            if kind == b"failed":
                on_failed_host(os.fsdecode(host))
            else:
                on_stopped()
        self._reports.close()

    def wait(self) -> None:
        """Until everything is printed; the launcher's end of `input` has to be closed."""
        self._process.wait()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    copy_output(sys.stdin.buffer, STDOUT, int(sys.argv[1]))


if __name__ == "__main__":
    main()
