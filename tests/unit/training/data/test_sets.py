"""What the sets of `--dataset` are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.data.sets import set_names


@pytest.mark.parametrize(
    ("directories", "names"),
    [
        (["/data/zh/arrow", "/data/en/arrow"], ["zh", "en"]),
        (["/data/zh/arrow"], ["zh"]),
        (["/data/zh/web/arrow", "/data/en"], ["zh/web", "en"]),
        (["/data/arrow", "/data/more/arrow"], ["data", "data/more"]),
        (["/data", "/data/arrow"], ["data", "data/arrow"]),
        (["/a/arrow", "/b/arrow"], ["a", "b"]),
        (["/data/arrow/zh", "/data/arrow/en"], ["zh", "en"]),
        (["/data/x/../zh/arrow", "/data/en/arrow/"], ["zh", "en"]),
        (["/arrow", "/data"], ["arrow", "data"]),
        ([], []),
    ],
)
def test_a_name_is_the_path_below_the_common_parent(directories: list[str], names: list[str]) -> None:
    assert set_names([Path(directory) for directory in directories]) == names


def test_relative_paths_are_named_as_absolute_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert set_names([Path("zh/arrow"), tmp_path / "en" / "arrow"]) == ["zh", "en"]
    assert set_names([Path(".")]) == [tmp_path.name]


_NAMES = st.sampled_from(["arrow", "zh", "en"])


@given(st.lists(st.lists(_NAMES, min_size=1, max_size=4), min_size=1, max_size=6, unique_by=tuple))
def test_different_directories_have_different_names(paths: list[list[str]]) -> None:
    names = set_names([Path("/", *parts) for parts in paths])
    assert len(set(names)) == len(names)
    assert all(name and name != "." and not name.startswith("/") for name in names)
