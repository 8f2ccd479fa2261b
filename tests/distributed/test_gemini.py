"""Gemini on CPUs: right in each state, with one checkpoint format, beside zero2 in the same precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from canaries import run_processes
from gemini_cases import CASES, more_cases

SCRIPT = Path(__file__).with_name("gemini_cases.py")


def run_cases(directory: Path, *words: str) -> dict[str, str]:
    run_processes(SCRIPT, 2, str(directory), *words, timeout=900)
    return json.loads((directory / "outcomes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_cases(tmp_path_factory.mktemp("gemini"))


@pytest.mark.parametrize("name", [case[0] for case in CASES])
def test_gemini(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == "right"


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_cases(tmp_path_factory.mktemp("gemini_more"), "more")


@pytest.mark.slow  # minutes: about 80 cases more
@pytest.mark.parametrize("name", [case[0] for case in more_cases()])
def test_more_of_gemini(name: str, more_outcomes: dict[str, str]) -> None:
    assert more_outcomes[name] == "right"
