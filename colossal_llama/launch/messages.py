"""Lines for the person who launched a run.

Written byte by byte as they were given, whatever the locale, and nowhere when the terminal is gone.
"""

from __future__ import annotations

import contextlib
import os


def say(line: str) -> None:
    _write(1, line)


def say_error(line: str) -> None:
    _write(2, line)


def lose_terminal() -> None:
    """From now on everything is written nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for file in (1, 2):
        os.dup2(nowhere, file)
    os.close(nowhere)


def _write(file: int, line: str) -> None:
    with contextlib.suppress(OSError):
        os.write(file, os.fsencode(f"{line}\n"))
