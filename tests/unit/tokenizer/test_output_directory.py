"""Files go into any directory that can be written to: a new one, an empty one, one behind a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer.output_directory import place_files
from colossal_llama.utils.output_checks import why_not_output_directory

CONTENTS = {"settings.json": b"{}", "tokenizer.json": b"[]"}


@pytest.mark.parametrize("kind", ["new", "empty", "link", "link to nothing"])
def test_files_are_placed(tmp_path: Path, kind: str) -> None:
    target, real = tmp_path / "target", tmp_path / "real"
    if kind == "empty":
        target.mkdir()
    elif kind == "link":
        real.mkdir()
    if kind.startswith("link"):
        target.symlink_to(real)
    assert why_not_output_directory(target) is None
    place_files(target, CONTENTS, owned=[])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == CONTENTS
    assert target.is_symlink() == kind.startswith("link")
    assert not list(tmp_path.glob(".*"))


def test_a_directory_that_is_there_stays_the_same_one(tmp_path: Path) -> None:
    """It may be a mount point, which nothing can be renamed to."""
    before = tmp_path.stat().st_ino
    place_files(tmp_path, CONTENTS, owned=[])
    assert tmp_path.stat().st_ino == before
