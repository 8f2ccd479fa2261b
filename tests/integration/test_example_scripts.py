"""The example launch scripts, filled in and run for real on this machine's CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import environment
from support import ROOT

SETTINGS = ("PROJECT_NAME", "PARENT_SAVE_DIR", "PARENT_TENSORBOARD_DIR", "PARENT_CONFIG_FILE")


@pytest.fixture
def clone(tmp_path) -> Path:
    """A directory that looks like the clone, where scripts can be filled in."""
    directory = tmp_path / "clone"
    directory.mkdir()
    for name in ("train.py", "examples", "colossal_llama"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def run(clone: Path, script: str) -> subprocess.CompletedProcess:
    env = environment()
    env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env["GLOO_SOCKET_IFNAME"] = "lo"
    return subprocess.run(
        ["bash", script], cwd=clone, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def fill_in(clone: Path, example: str, training_inputs) -> None:
    """Gives the variables values, spaces in them, and small shapes."""
    text = (ROOT / example).read_text(encoding="utf-8")
    values = {
        "PROJECT_NAME": "trial",
        "PARENT_SAVE_DIR": str(clone / "all runs"),
        "PARENT_TENSORBOARD_DIR": str(clone / "all logs"),
        "PARENT_CONFIG_FILE": str(clone / "configs"),
        "PRETRAINED_MODEL_PATH": str(training_inputs.model),
    }
    for name, value in values.items():
        assert f'{name}=""' in text
        text = text.replace(f'{name}=""', f'{name}="{value}"')
    text = text.replace(
        "declare -a dataset=(", f'declare -a dataset=("{training_inputs.data / "part-00000"}"'
    )
    assert "--max_length 4096" in text
    text = text.replace("--max_length 4096", "--max_length 96")
    (clone / "train.sh").write_text(text, encoding="utf-8")


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
    for name in (*SETTINGS, "PRETRAINED_MODEL_PATH", "dataset"):
        assert name in finished.stderr
