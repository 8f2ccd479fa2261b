"""What the scripts write from small inputs is what `tests/golden/outputs.json` says, byte for byte.

An output that is meant to change: run `python tests/golden/remake.py`, and give the reason in the commit.
"""

from __future__ import annotations

import json

import pytest
from golden.commands import preparation_cases
from golden.remake import OUTPUTS, depends_on_versions, make_outputs

GROUPS = ["inputs", *(case.name for case in preparation_cases())]


@pytest.fixture(scope="module")
def stored() -> dict:
    return json.loads(OUTPUTS.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return make_outputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("group", GROUPS)
def test_files_are_as_stored(group: str, stored: dict, made: dict) -> None:
    """`inputs` comes first: where they differ, so does the rest."""
    same_versions = stored["versions"] == made["versions"]

    def files(outputs: dict) -> dict[str, str]:
        return {
            name: value
            for name, value in outputs["files"].items()
            if name.startswith(f"{group}/") and (same_versions or not depends_on_versions(name))
        }

    assert files(made) == files(stored)


def test_two_workers_write_what_one_writes(made: dict) -> None:
    one, two = "data/pretrain-chunk/", "data/pretrain-chunk-2-workers/"
    files = made["files"]
    names = [name.removeprefix(one) for name in files if name.startswith(one)]
    assert names
    assert [files[one + name] for name in names] == [files[two + name] for name in names]


def test_training_visits_the_rows_in_the_stored_order(stored: dict, made: dict) -> None:
    assert made["tokens_of_steps"] == stored["tokens_of_steps"]


def test_every_stored_file_belongs_to_a_group(stored: dict) -> None:
    assert all(name.startswith(tuple(f"{group}/" for group in GROUPS)) for name in stored["files"])
