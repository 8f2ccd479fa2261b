"""What a person sees in the terminal: log lines, tables and progress bars, from the main rank only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from colossal_llama.utils.errors import is_main_process

if TYPE_CHECKING:
    from tqdm import tqdm


def log(message: str) -> None:
    """Prints a line on stdout from rank 0; a running progress bar is kept intact."""
    if not is_main_process():
        return
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stdout)
    else:
        print(message)
    sys.stdout.flush()


def warn(message: str) -> None:
    """Like `log`, on stderr, marked as a warning."""
    if not is_main_process():
        return
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(f"warning: {message}", file=sys.stderr)
    else:
        print(f"warning: {message}", file=sys.stderr)


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; silent off the main rank; a line every ten seconds where stderr is no
    terminal.
    """
    from tqdm import tqdm

    options.setdefault("disable", not is_main_process())
    options.setdefault("dynamic_ncols", True)
    if not sys.stderr.isatty():
        options.setdefault("mininterval", 10.0)
        options.setdefault("ascii", True)
        options["dynamic_ncols"] = False
        options.setdefault("ncols", 100)
    return tqdm(iterable, **options)


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
