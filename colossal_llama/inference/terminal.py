"""Notes for people on standard error, and reading what they type: standard output is for answers alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def note(message: str) -> None:
    print(f"[{message}]", file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Prints a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_streams() -> None:
    """Characters that a stream can't hold are replaced; a standard input that was closed is an empty one."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (open as long as the program runs)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


@contextlib.contextmanager
def until_reader_leaves() -> Iterator[None]:
    """Ends quietly where the reader of standard output (`head`, say) has what it wants."""
    try:
        yield
    except BrokenPipeError:
        # Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_message(prompt: str) -> str | None:
    """The next line of standard input, None at its end. `prompt` is shown if a person types."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and line editing)
    if not sys.stdout.isatty():
        # `input` would write the prompt among the answers.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
