"""What is found wrong with outputs before the work."""

from __future__ import annotations

from pathlib import Path

from colossal_llama.utils.output_checks import (
    why_not_output_directory,
    why_not_output_file,
    why_not_replaceable,
    why_not_writable,
)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert why_not_output_directory(tmp_path / "loop") is not None
    assert why_not_output_directory(tmp_path / "loop" / "below") is not None


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    assert "not UTF-8 text" in why_not_output_directory(tmp_path / "\udcff" / "below")


def test_a_link_to_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert why_not_output_directory(tmp_path / "link") == "is not a directory"
    assert "is not a directory" in why_not_output_directory(tmp_path / "link" / "below")


def test_what_may_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert why_not_replaceable(path, lambda _: False) is None
    assert why_not_replaceable(Path("/dev/null"), lambda _: False) is None
    path.write_text(" \n")
    assert why_not_replaceable(path, lambda _: False) is None
    path.write_text('[1]\n{"a')
    assert why_not_replaceable(path, lambda value: value == [1]) is None
    for is_ours in (lambda value: value == [2], lambda value: len(value[0]) == 1):
        assert "is there already" in why_not_replaceable(path, is_ours)


def test_output_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file"
    assert why_not_output_file(path, lambda _: False) is None
    path.mkdir(parents=True)
    assert why_not_output_file(path, lambda _: False) == "is a directory"
    (tmp_path / "b").write_text("text")
    assert why_not_output_file(tmp_path / "b", lambda _: True).startswith("is there already")
    assert "is not a directory" in why_not_output_file(tmp_path / "b" / "file", lambda _: True)


def test_a_directory_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    assert why_not_writable(tmp_path) is None
    assert why_not_writable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert why_not_writable(tmp_path / "file" / "a") == f"{tmp_path / 'file'}: Not a directory"
    assert why_not_writable(Path("/proc/a")).startswith("/proc: ")
