"""Sets of prepared data: one `arrow/` directory each, and what they are called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

ARROW_DIRECTORY = "arrow"


def set_directory(path: Path) -> Path:
    """The directory of the set that a path of `--dataset` or `--eval_dataset` belongs to: of a part, its
    parent. The same for every way to write the path.
    """
    absolute = Path(os.path.abspath(path))
    return absolute.parent if (absolute / "state.json").is_file() else absolute


def set_names(directories: Sequence[Path]) -> list[str]:
    """A name for each set: its path below the sets' common parent, without a last `arrow`.

    >>> set_names([Path("/data/zh/arrow"), Path("/data/en/arrow")])
    ['zh', 'en']
    """
    paths = [Path(os.path.abspath(directory)) for directory in directories]
    bare = [path.parent if path.name == ARROW_DIRECTORY and path.parent.name else path for path in paths]
    if len(set(bare)) < len(set(paths)):  # `x` and `x/arrow` are two
        bare = paths
    if not bare:
        return []
    common = os.path.commonpath([path.parent for path in bare])
    return [path.relative_to(common).as_posix() for path in bare]
