"""What sets of prepared data are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.training.data.sets import set_directory, set_names


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        ([], []),
        (["/data/zh/arrow"], ["zh"]),
        (["/data/zh/arrow", "/data/en/arrow"], ["zh", "en"]),
        (["/data/zh", "/data/en/arrow"], ["zh", "en"]),
        (["/data/new/zh/arrow", "/data/old/arrow", "/data/old/arrow/arrow"], ["new/zh", "old", "old/arrow"]),
        (["/data/arrow", "/data/held_out/arrow"], ["data", "data/held_out"]),
        (["/data/x", "/data/x/arrow"], ["x", "x/arrow"]),
        (["/a/b", "/c/d/arrow"], ["a/b", "c/d"]),
        (["/arrow"], ["arrow"]),
    ],
)
def test_names_are_the_paths_below_what_the_sets_share(directories: list[str], names: list[str]) -> None:
    assert set_names([Path(directory) for directory in directories]) == names


def test_a_part_belongs_to_the_set_of_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "zh" / "arrow" / "part-00000"
    part.mkdir(parents=True)
    (part / "state.json").touch()
    monkeypatch.chdir(tmp_path)
    for path in (part, part.parent, Path("zh/arrow"), Path("zh/../zh/arrow/part-00000")):
        assert set_directory(path) == part.parent
