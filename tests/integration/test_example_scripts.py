"""The example launch scripts, filled in and run for real on this machine's CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from example_scripts import SETTINGS, fill_in
from launch import environment
from support import ROOT


def launch_environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**environment(), "PATH": path, "GLOO_SOCKET_IFNAME": "lo"}


def run(clone: Path, script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", script],
        cwd=clone,
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("example", ["train.example.sh", "train_sft.example.sh"])
def test_example_trains_once_its_variables_are_filled_in(example, clone, training_inputs):
    fill_in(clone, example, training_inputs)
    finished = run(clone, "train.sh")
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert (clone / "all runs" / "trial" / "modeling" / "model.safetensors").is_file()
    lines = (clone / "all logs" / "trial" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == len(lines) > 0


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGHUP, 129)]
)
def test_stopped_on_one_host_it_saves(clone, training_inputs, number, code):
    fill_in(clone, "train.example.sh", training_inputs, flags={"num_epochs": 20})
    metrics = clone / "all logs" / "trial" / "metrics.jsonl"
    output = clone / "output.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(
            ["bash", "train.sh"],
            cwd=clone,
            env=launch_environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 180
        while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 4):
            assert process.poll() is None, output.read_text()[-3000:]
            assert time.monotonic() < deadline, output.read_text()[-3000:]
            time.sleep(0.1)
        process.send_signal(number)
        if number == signal.SIGHUP:
            time.sleep(0.3)
            process.send_signal(number)  # the shell and the kernel say so, each for itself
        assert process.wait(timeout=60) == code, output.read_text()[-3000:]
    finally:
        process.kill()  # when it still runs; what it started ends with its epochs
    assert list((clone / "all runs" / "trial").glob("epoch-*_step-*/COMPLETE"))
    if number == signal.SIGHUP:
        return  # the terminal is gone
    text = output.read_text()
    assert "SIGTERM: every process has saved and exited with code 143" in text
    assert re.search(r"Last complete checkpoint: .*/all runs/trial/epoch-\d+_step-\d+;", text)


def test_everything_that_is_missing_is_listed_before_anything_starts(clone):
    (clone / "train.sh").write_text((ROOT / "train.example.sh").read_text(encoding="utf-8"))
    finished = run(clone, "train.sh")
    assert finished.returncode == 2
    for name in (*SETTINGS, "dataset"):
        assert name in finished.stderr
