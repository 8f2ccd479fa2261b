"""What makes a machine unfit to take part: other versions, other files, no way to write."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from colossal_llama.corpus.storage import list_input
from colossal_llama.dataset.workers import node_check
from colossal_llama.dataset.workers.node_check import find_node_problems, make_node_check, remove_token_files


@pytest.fixture
def directories(tmp_path: Path) -> list[Path]:
    (tmp_path / "in").mkdir()
    for number in range(120):
        (tmp_path / "in" / f"{number:03d}.jsonl").write_text("{}\n")
    return [tmp_path / "out" / "cache", tmp_path / "elsewhere"]


def test_this_machine_is_fit_and_nothing_stays_behind(directories: list[Path], tmp_path: Path) -> None:
    files = list(list_input(tmp_path / "in", (".jsonl",)).files.values())
    with make_node_check(directories, files) as check:
        assert len(check.token_files) == 2
        assert 40 <= len(check.samples) <= node_check.MAX_SAMPLES
        assert find_node_problems(check) == []
    assert [list(directory.iterdir()) for directory in directories] == [[], []]
    (directories[0] / ".visible-0123456789abcdef").touch()
    (directories[0] / "mine").touch()
    remove_token_files(directories)
    assert [path.name for path in directories[0].iterdir()] == ["mine"]


def test_what_is_wrong_is_said(
    directories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_check, "SECONDS_TO_SEE_A_FILE", 0.2)
    files = list(list_input(tmp_path / "in", (".jsonl",)).files.values())
    with make_node_check(directories, files) as check:
        other = dataclasses.replace(check, software={**check.software, "tokenizers": "0.1"})
        (problem,) = find_node_problems(other)
        assert problem.startswith("has tokenizers ")
        assert "not 0.1; install the same versions" in problem
        for content in ("another key", None):
            path = Path(check.token_files[0])
            path.write_text(content) if content else path.unlink()
            (problem,) = find_node_problems(check)
            assert str(path.parent) in problem
            assert "storage that all nodes share" in problem
        path.write_text(check.key)
        sample = Path(check.samples[3].path)
        sample.write_text("{ }\n")
        assert find_node_problems(check) == [
            f"sees another {sample}, of another size or time; use shared storage"
        ]
        sample.unlink()
        (problem,) = find_node_problems(check)
        assert problem.startswith(f"does not see the input: {sample}: no such file")


def test_a_directory_that_can_not_be_written(
    directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> int:
        raise OSError(30, os.strerror(30), str(path))

    with make_node_check(directories, []) as check:
        monkeypatch.setattr(Path, "write_text", refuse)  # tests run as root, who may write anywhere
        problems = find_node_problems(check)
        monkeypatch.undo()
    assert problems == [
        f"can't write to {directory}: Read-only file system" for directory in sorted(directories)
    ]
