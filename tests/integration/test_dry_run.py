"""`train.py --dry_run` answers what the run would: exit code 0 for 0, 2 for 2, with the same complaint."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from dry_run_cases import CASES
from support import ROOT


@pytest.fixture(scope="module")
def answers(training_inputs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Both answers to every case, given in one process: starting a process for each would take minutes."""
    finished = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tests" / "dry_run_cases.py")),
            *map(str, (training_inputs.model, training_inputs.data, tmp_path_factory.mktemp("cases"))),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    lines = (json.loads(line) for line in finished.stdout.splitlines() if line.startswith('{"name"'))
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_answers_as_the_run_does(name: str, answers: dict[str, dict]) -> None:
    answer = answers[name]
    (dry, said), (real, really_said) = answer["dry"], answer["run"]
    expected, _ = CASES[name]
    assert (dry, real) == (expected, expected), f"dry run:\n{said}\nrun:\n{really_said}"
    assert "Traceback" not in said + really_said
    assert answer["touched"] == []
    if expected == 2:
        # The flag that the complaint begins with.
        assert said.split()[0] == really_said.split()[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resumed", "epoch-0_step-1: 1 steps are done"),
        ("new_stage", "A new stage with the weights of "),
        ("new_stage_with_the_same_optimizer", "A new stage that keeps the optimizer of "),
        ("longer_context", "500,000, scaled by yarn:2"),
    ],
)
def test_a_dry_run_says_where_the_run_begins(name: str, said: str, answers: dict[str, dict]) -> None:
    assert said in answers[name]["dry"][1]
