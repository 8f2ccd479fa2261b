"""Sets of data, and their names in metrics and messages.

A set is a directory of parts, an `arrow/`; parts that were given one by one belong to that of their parent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What the prepare scripts call the directory of a set's parts: it tells no set from another.
_ARROW = "arrow"


@dataclass(frozen=True)
class RowSet:
    """One set of a data set.

    Attributes:
        bins: in order, the [start, end) ranges of each bin's rows.
    """

    name: str
    num_rows: int
    num_tokens: int
    bins: list[list[tuple[int, int]]]


def set_directory(path: Path) -> Path:
    """The directory of the set that a path of `--dataset` belongs to: of a part, its parent."""
    absolute = Path(os.path.abspath(path))
    return absolute.parent if (absolute / "state.json").is_file() else absolute


def set_names(directories: Sequence[Path]) -> list[str]:
    """The name of each set: its path below the sets' common parent, without a last `arrow`.

    /data/zh/arrow, /data/en/arrow     zh, en
    /data/zh/web/arrow, /data/en       zh/web, en
    /data/zh/arrow                     zh
    """
    paths = [Path(os.path.abspath(directory)) for directory in directories]
    named = [path.parent if path.name == _ARROW and path.parent.name else path for path in paths]
    if len(set(named)) < len(named):  # `data` beside `data/arrow`
        named = paths
    if not named:
        return []
    parent = os.path.commonpath([path.parent for path in named])
    return [path.relative_to(parent).as_posix() for path in named]
