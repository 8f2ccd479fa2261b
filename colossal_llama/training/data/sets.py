"""Sets of data, one `arrow/` directory each, and their names in metrics and messages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# What the prepare scripts call the directory of a set's parts: it tells no set from another.
_ARROW = "arrow"


def set_directory(path: Path, is_part: bool) -> Path:
    """The directory of the set that a `--dataset` path belongs to: its own, or that of a part's parent."""
    return Path(os.path.abspath(path)).parent if is_part else Path(os.path.abspath(path))


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
