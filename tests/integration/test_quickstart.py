"""quickstart.sh as a newcomer runs it, in the environment that runs the tests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture
def environment() -> dict[str, str]:
    """The tests' own Python first on PATH, and nothing that the tests have set."""
    names = ("HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")
    path = f"{Path(sys.executable).parent}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
    return {"PATH": path} | {name: os.environ[name] for name in names if name in os.environ}


def stop_in_the_first_training(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    """Runs quickstart.sh until it trains, presses Ctrl-C, and returns what it printed."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("warning: the first loss is"):  # as it should be with random weights
            os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130, "".join(printed)[-4000:]
    return "".join(printed)


def test_quickstart(root: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    output = tmp_path / "a directory with spaces"
    command = ["bash", str(root / "quickstart.sh"), "--output_dir", str(output), "--device", "cpu"]
    printed = stop_in_the_first_training(command, tmp_path, environment)
    assert "Stopped in step 6 of 12. To continue there: bash quickstart.sh --output_dir " in printed
    assert list((output / "pretrain").glob("epoch-*_step-*/COMPLETE")), printed[-4000:]

    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    lines = result.stdout.splitlines()
    model_dir = output / "sft" / "modeling"
    assert lines[-1] == f"Model: {model_dir}"
    assert sum(line == "(as in the sample)" for line in lines) == 3

    # It continues where it was stopped, says how much is left, and ends with results and what to try next.
    assert [line[:9] for line in lines if line.endswith(": finished by an earlier run")] == [
        f"[{number} of 12]" for number in range(1, 6)
    ]
    assert "Resumed from " in result.stdout
    progress = [
        line for line in lines if re.fullmatch(r"\[\d+ of 12\] .* \(about \d+ (minutes|seconds) left\)", line)
    ]
    assert len(progress) == 7, progress
    assert "Replacing" not in result.stdout
    end = lines[lines.index(progress[-1]) :]
    assert any(line.startswith("trained ") for line in end)
    assert f"Curves: {output}/pretrain_logs/training_curves.png" in end
    assert "What to try next:" in end
    for stage in ("pretrain", "sft"):
        metrics = (output / f"{stage}_logs" / "metrics.jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in metrics.splitlines()]
        losses = [record["loss"] for record in records if "loss" in record]
        assert losses[-1] < 0.7 * losses[0]
        assert (output / f"{stage}_logs" / "training_curves.png").is_file()

    # On held-out text, the start of training is the extended model, and each step of the way is better.
    comparison = json.loads((output / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    base, extended, trained = (each for each in comparison["results"] if each["category"] is None)
    assert [each["model"] for each in (base, extended, trained)] == ["base_model", "model", "pretrain"]
    assert trained["bits_per_byte"] < extended["bits_per_byte"] < base["bits_per_byte"]
    assert trained["interval"][1] < 0
    metrics = (output / "pretrain_logs" / "metrics.jsonl").read_text(encoding="utf-8")
    first = json.loads(metrics.splitlines()[0])
    assert first["step"] == 0
    assert abs(first["eval_bits_per_byte"] - extended["bits_per_byte"]) < 0.05
    reports = {report["model"]: report for report in comparison["new_rows"]}
    assert reports["pretrain"]["start"] == reports["model"]["start"] == "model"
    assert len(reports["pretrain"]["hardly_moved"]) < reports["pretrain"]["pieces"] / 10

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    assert (
        model.config.vocab_size >= len(tokenizer) > len(AutoTokenizer.from_pretrained(output / "base_model"))
    )


def test_directories_of_other_people_are_left_alone(
    root: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("mine")
    result = subprocess.run(
        ["bash", str(root / "quickstart.sh"), "--output_dir", str(tmp_path), "--device=cpu"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 2
    assert "not empty and not made by quickstart.sh" in result.stderr
    assert (tmp_path / "model" / "weights").read_text() == "mine"


def test_all_bad_arguments_at_once(root: Path) -> None:
    command = ["bash", str(root / "quickstart.sh"), "--device", "tpu", "--fast", "--output_dir"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    for problem in ("--device tpu: ", "--fast: unknown", "--output_dir: give a value"):
        assert f"error: {problem}" in result.stderr
