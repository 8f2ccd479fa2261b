"""The example launch scripts, filled in and run for real on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_scripts import SETTINGS, fill_in
from launch import environment
from support import ROOT


def run(clone: Path, script: str) -> subprocess.CompletedProcess:
    env = environment()
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        ["bash", script], cwd=clone, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("example", ["train.example.sh", "train_sft.example.sh"])
def test_example_trains_once_its_variables_are_filled_in(example, clone, training_inputs):
    fill_in(clone, example, training_inputs)
    finished = run(clone, "train.sh")
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert (clone / "all runs" / "trial" / "modeling" / "model.safetensors").is_file()
    lines = (clone / "all logs" / "trial" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == len(lines) > 0


def test_everything_that_is_missing_is_listed_before_anything_starts(clone):
    (clone / "train.sh").write_text((ROOT / "train.example.sh").read_text(encoding="utf-8"))
    finished = run(clone, "train.sh")
    assert finished.returncode == 2
    for name in (*SETTINGS, "dataset"):
        assert name in finished.stderr
