"""What a person sees in the terminal: log lines, tables and progress bars, from the main rank only."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from colossal_llama.utils.errors import is_main_process

if TYPE_CHECKING:
    from tqdm import tqdm

# Of progress where stderr is no terminal.
SECONDS_BETWEEN_LINES = 10.0


def log(message: str) -> None:
    """Prints a line on stdout from rank 0; a running progress bar is kept intact."""
    if is_main_process():
        _write_line(message, sys.stdout)


def warn(message: str) -> None:
    """Like `log`, on stderr, marked as a warning."""
    if is_main_process():
        _write_line(f"warning: {message}", sys.stderr)


def _write_line(line: str, stream: TextIO) -> None:
    """Once the reader has closed the pipe (`head`, for example), output is discarded; the work continues."""
    try:
        if "tqdm" in sys.modules:
            from tqdm import tqdm

            tqdm.write(line, file=stream)
        else:
            print(line, file=stream)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm | PlainProgress:
    """A tqdm bar on stderr; lines of text where stderr is no terminal; silent off the main rank.

    Args:
        options: tqdm's `total`, `desc`, `unit`, `unit_scale`, `initial` and `leave`.
    """
    if not is_main_process():
        return PlainProgress(iterable, seconds_between_lines=math.inf)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(iterable, **{"dynamic_ncols": True, **options})
    return PlainProgress(iterable, **options)


class PlainProgress:
    """Progress for logs: `train: 120/400 steps (30 %), 2.0 steps/s, 2:20 left, loss=5.1`, one line at a time.

    Work that is done before the first line is due leaves none.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        total: float | None = None,
        desc: str = "",
        unit: str = "it",
        unit_scale: bool = False,
        initial: float = 0,
        leave: bool = True,
        seconds_between_lines: float = SECONDS_BETWEEN_LINES,
    ) -> None:
        self.iterable, self.total, self.desc = iterable, total, desc
        if total is None and isinstance(iterable, Sized):
            self.total = len(iterable)
        self.unit = unit if unit == "B" else unit.strip().removesuffix("s") + "s"
        self.unit_scale, self.n, self.initial, self.leave = unit_scale, initial, initial, leave
        self.seconds_between_lines, self.postfix = seconds_between_lines, ""
        self.started = self.last_line = time.monotonic()
        self.written_n: float | None = None

    def update(self, n: float = 1) -> None:
        self.n += n
        now = time.monotonic()
        if now - self.last_line >= self.seconds_between_lines:
            self.last_line = now
            self._write_line(now)

    def set_postfix(self, refresh: bool = True, **facts: Any) -> None:
        self.set_postfix_str(", ".join(f"{name}={value}" for name, value in facts.items()))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def close(self) -> None:
        if self.leave and self.written_n not in (None, self.n):
            self._write_line(time.monotonic())

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update()
        self.close()

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_line(self, now: float) -> None:
        self.written_n = self.n
        words = f"{self.desc}: {self._amount(self.n)}"
        if self.total:
            words += f"/{self._amount(self.total)} {self.unit} ({100 * self.n / self.total:.0f} %)"
        else:
            words += f" {self.unit}"
        rate = (self.n - self.initial) / max(now - self.started, 1e-9)
        if rate:
            fast = rate >= 1 or self.unit_scale
            words += f", {self._amount(rate)} {self.unit}/s" if fast else f", {1 / rate:.1f} s each"
        if rate and self.total and self.n < self.total:
            words += f", {timedelta(seconds=round((self.total - self.n) / rate))} left"
        _write_line(words + (f", {self.postfix}" if self.postfix else ""), sys.stderr)

    def _amount(self, number: float) -> str:
        if not self.unit_scale:
            return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
        for prefix in ("", "k", "M", "G"):
            if number < 1000:
                return f"{number:.3g}{prefix}"
            number /= 1000
        return f"{number:,.1f}T"


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain-text table: first column left-aligned, the others right; integers with thousands separators."""
    cells = [[str(name) for name in header]] + [[_format_cell(value) for value in row] for row in rows]
    widths = [max(_display_width(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell + " " * (w - _display_width(cell)) if i == 0 else " " * (w - _display_width(cell)) + cell
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _format_cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return str(value)


def _display_width(text: str) -> int:
    """Columns in a terminal: East Asian wide characters take two."""
    import unicodedata

    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
