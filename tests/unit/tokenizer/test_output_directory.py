"""Files go into any directory that can be written to: a new one, an empty one, one behind a link."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer.output_directory import objection_to_output, place_files

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
    assert objection_to_output(target) is None
    place_files(target, CONTENTS, owned=[])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == CONTENTS
    assert target.is_symlink() == kind.startswith("link")
    assert not list(tmp_path.glob(".*"))


def test_a_directory_that_is_there_stays_the_same_one(tmp_path: Path) -> None:
    """It may be a mount point, which nothing can be renamed to."""
    before = tmp_path.stat().st_ino
    place_files(tmp_path, CONTENTS, owned=[])
    assert tmp_path.stat().st_ino == before


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert objection_to_output(tmp_path / "loop") is not None
    assert objection_to_output(tmp_path / "loop" / "below") is not None


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    assert "not UTF-8 text" in objection_to_output(tmp_path / "\udcff" / "below")


def test_a_link_to_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert objection_to_output(tmp_path / "link") == "is not a directory"
    assert "is not a directory" in objection_to_output(tmp_path / "link" / "below")
