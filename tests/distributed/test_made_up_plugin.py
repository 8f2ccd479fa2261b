"""A plugin is one class and one line: a made-up one trains, saves and is known to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import train

SCRIPT = Path(__file__).parent / "made_up_plugin_train.py"
SHORT = ["--max_steps", 3, "--lr", 1e-3, "--batch_size", 2, "--accumulation_steps", 2]


def test_a_made_up_plugin_trains_as_ddp_does(tmp_path, training_inputs):
    flags = [*training_inputs.flags(), *SHORT, "--mixed_precision", "fp32", "--plugin"]
    ours = train(tmp_path / "made_up", 2, *flags, "made_up", script=SCRIPT)
    assert ours.returncode == 0, ours.output[-3000:]
    assert "made_up, fp32" in ours.output
    expected = train(tmp_path / "ddp", 2, *flags, "ddp")
    assert ours.losses() == pytest.approx(expected.losses(), rel=1e-6)
    checkpoint = ours.save_dir / "epoch-0_step-3"
    assert [path.name for path in (checkpoint / "optimizer").iterdir()] == [
        "tp-000_pp-000_zero-0000.safetensors"
    ]
    resumed = train(
        tmp_path / "made_up",
        2,
        *training_inputs.flags(),
        *("--max_steps", 4, "--lr", 1e-3, "--batch_size", 2, "--accumulation_steps", 2),
        *("--mixed_precision", "fp32", "--plugin", "made_up", "--load_checkpoint", "latest"),
        script=SCRIPT,
    )
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert "Resumed from" in resumed.output


def test_its_limits_and_its_plan_are_known(tmp_path, training_inputs):
    flags = [*training_inputs.flags(), *SHORT, "--plugin", "made_up"]
    refused = train(tmp_path / "fp16", 1, *flags, script=SCRIPT)
    assert "made_up knows fp32 only" in refused.output
    planned = train(tmp_path / "plan", 1, *flags, "--mixed_precision", "fp32", "--dry_run", script=SCRIPT)
    assert planned.returncode == 0, planned.output[-3000:]
    assert "made_up" in planned.output
