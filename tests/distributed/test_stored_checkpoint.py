"""A checkpoint that an earlier version made continues as that version would have continued it."""

from __future__ import annotations

import shutil

import pytest
from golden.commands import CHECKPOINT, script_environment
from golden.make_checkpoint import CHECKPOINT_NAME, LAST_STEP, SAVED_STEP, read_metrics, training_command


def test_a_stored_checkpoint_continues(tmp_path):
    directory = tmp_path / "copy"
    shutil.copytree(CHECKPOINT, directory)
    resume = training_command("run", LAST_STEP, "--load_checkpoint", f"run/checkpoints/{CHECKPOINT_NAME}")
    finished = resume.run(directory, script_environment())
    assert finished.returncode == 0, finished.stderr[-3000:]
    output = finished.stdout + finished.stderr
    assert f"{CHECKPOINT_NAME}: step {SAVED_STEP}" in output, output[-3000:]
    assert "when saved" not in output, output[-3000:]
    metrics = read_metrics(directory / "run" / "logs" / "metrics.jsonl")
    expected = read_metrics(directory / "expected_metrics.jsonl")
    assert any(record["epoch"] == 1 for record in expected), "the run has to cross an epoch"
    assert len(metrics) == len(expected) == LAST_STEP
    for ours, theirs in zip(metrics, expected, strict=True):
        for key in ("step", "epoch", "tokens"):
            assert ours[key] == theirs[key]
        # Floats differ a little between processors.
        for key in ("loss", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
