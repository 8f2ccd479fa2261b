"""What the comparison of commits calls different, and what it leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden.commands import Case, Command, preparation_cases
from golden.compare_commits import Result, compare_results, select, unknown_flags
from golden.contents import compare_directories, compare_values
from golden.float_commands import float_cases
from safetensors.torch import save_file


@pytest.fixture
def sides(tmp_path: Path) -> list[Path]:
    """Two equal output directories."""
    sides = [tmp_path / "old", tmp_path / "new"]
    for side in sides:
        (side / "modeling").mkdir(parents=True)
        save_file({"a": torch.ones(3), "b": torch.tensor([0.0, float("nan")])}, side / "w.safetensors")
        (side / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "step_seconds": 1}\n')
        (side / "running_states.json").write_text('{"state": {"step": 1}, "versions": {"torch": "2"}}')
        (side / "COMPLETE").write_text('{"w.safetensors": [1, "x"]}')
        (side / "modeling" / "tokenizer.model").write_bytes(b"abc")
    return sides


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.5, "step_seconds": 7}\n'),
        ("running_states.json", '{"versions": {}, "state": {"step": 1}}'),
        ("COMPLETE", '{"w.safetensors": [1, "y"]}'),
        ("training_curves.png", "picture"),
        ("cache/shard", "bytes"),
    ],
)
def test_times_versions_and_pictures_are_left_out(sides: list[Path], name: str, content: str) -> None:
    (sides[1] / name).parent.mkdir(exist_ok=True)
    (sides[1] / name).write_text(content)
    assert compare_directories(*sides) == (5, None)


@pytest.mark.parametrize(
    ("name", "content", "difference"),
    [
        ("metrics.jsonl", '{"step": 1, "loss": 2.5000001}\n', "line 1: loss: 2.5 in old, 2.5000001 in new"),
        ("metrics.jsonl", "", "1 lines in old, 0 in new"),
        ("running_states.json", '{"state": {"step": 1, "x": 0}}', "state.x: only new has it"),
        ("running_states.json", '{"state": {"step": 1.0}}', "state.step: 1 in old, 1.0 in new"),
        ("COMPLETE", "{}", ": 1 entries in old, 0 in new"),
        ("modeling/tokenizer.model", "abd", "differs from byte 2 on"),
        ("new.json", "{}", "only new has it"),
    ],
)
def test_the_first_difference_is_named(sides: list[Path], name: str, content: str, difference: str) -> None:
    (sides[1] / name).write_text(content)
    assert compare_directories(*sides)[1] == f"{name}: {difference}"


@pytest.mark.parametrize(
    ("tensors", "difference"),
    [
        ({"a": torch.ones(3), "b": torch.tensor([-0.0, float("nan")])}, "b: values differ by up to nan"),
        ({"a": torch.ones(3).nextafter(torch.zeros(3))}, "b: only old has it"),
        (
            {"a": torch.ones(3).half(), "b": torch.zeros(2)},
            "a: torch.float32 [3] in old, torch.float16 [3] in new",
        ),
        ({"a": torch.tensor([1.0, 1.5, 1.0]), "b": torch.zeros(2)}, "a: values differ by up to 0.5"),
    ],
)
def test_tensors_are_compared_by_bits(sides: list[Path], tensors: dict, difference: str) -> None:
    save_file(tensors, sides[1] / "w.safetensors")
    assert compare_directories(*sides)[1] == f"w.safetensors: {difference}"


def test_nan_equals_itself_in_json() -> None:
    values = [json.loads('{"loss": [NaN, 1]}') for _ in range(2)]
    assert compare_values(*values) is None


def test_sets_have_no_order() -> None:
    values = [{"target_modules": ["q_proj", "k_proj"]}, {"target_modules": ["k_proj", "q_proj"]}]
    assert compare_values(*values) is None
    assert compare_values({"modules": [1, 2]}, {"modules": [2, 1]}) == "modules[0]: 1 in old, 2 in new"


def test_exit_codes_and_streams_count() -> None:
    good, bad = Result(0, "a\nb", ""), Result(2, "", "error: unknown arguments: --x 1 (see --help)\n")
    case = Case("name", [Command("script.py", streams=["stdout"])])
    assert compare_results(case, [good], [good]) is None
    assert compare_results(case, [good], [Result(0, "a\nc", "")]) == "stdout line 2: 'b' in old, 'c' in new"
    assert compare_results(case, [good], [bad]).startswith("exit code 0 in old, 2 in new: error: unknown")
    assert compare_results(case, [bad], [bad]).startswith("exit code 2 on both sides")
    assert unknown_flags([bad]) == "unknown arguments: --x 1 (see --help)"
    assert unknown_flags([good]) is None


def test_what_a_command_needs_runs_before_it() -> None:
    cases = [*preparation_cases(), *float_cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    ordered, asked = select(cases, "^inference/adapter$")
    assert asked == {"inference/adapter"}
    assert [case.name for case in ordered] == ["data/base", "training/lora", "inference/adapter"]
