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


def test_what_hosts_say_is_understood_in_pieces(tmp_path):
    """`colossalai run` prints pieces of 1000 bytes from each host in turn, whole lines or not."""
    for said, stopped, failed in (
        ("Stopped by SIGTERM after step 5; continue with --load_checkpoint latest\n", True, ""),
        ("Stopped by SIGTEother hostRM after step 5; continue with --load_checkpoint latest\n", True, ""),
        ("Stopped by SIGTERM after step 5; contiother\nhostnue with --load_checkpoint latest\n", True, ""),
        ("failed to make it writable, and continue with --load_checkpoint latest\n", False, ""),
        ("exitcoError: failed to run torchrun --x on y on host-b, is localhost: False\n", False, "host-b"),
    ):
        script = "source examples/launch/launch.sh; trap : USR1; run_state=$1; relay_output"
        for left_over in tmp_path.iterdir():
            left_over.unlink()
        relayed = subprocess.run(
            ["bash", "-c", script, "bash", tmp_path],
            cwd=ROOT,
            input=said,
            capture_output=True,
            text=True,
            check=True,
        )
        assert relayed.stdout == said
        assert (tmp_path / "stopped").exists() == stopped, said
        assert (tmp_path / "failed").exists() == bool(failed), said
        assert not failed or (tmp_path / "failed").read_text() == failed + "\n"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_processes_of_the_run_are_found_whatever_the_names(locale, tmp_path):
    """The environment and save_dir may have spaces and Chinese in their paths; another run is left alone."""
    python = tmp_path / "my 环境" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "train.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    (tmp_path / "torchrun").symlink_to("train.py")
    directories = ["所有 runs/trial", "所有 runs/trial2", "runs/trial"]
    commands = [["-u", "train.py", "--save_dir", name] for name in directories]
    commands += [[str(tmp_path / "torchrun"), "--x", "train.py", f"--save_dir={directories[0]}", "--lr", "1"]]
    processes = [
        subprocess.Popen([python, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for words in commands
    ]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in processes)
        script = "source examples/launch/launch.sh; save_dir=$1; "
        for before, ended in (("-u ", [0]), ("([^ ]*|/.*/)torchrun .*", [0, 3])):
            # The other host's locale is not the script's.
            signal_them = f"command=$(signal_command TERM '{before}'); LC_ALL=C.UTF-8 bash -c \"$command\""
            words = ["bash", "-c", script + signal_them, "bash", directories[0]]
            subprocess.run(words, cwd=ROOT, env={**environment(), "LC_ALL": locale}, check=True)
            for number in ended:
                assert processes[number].wait(timeout=10) == -signal.SIGTERM
            running = [number for number, process in enumerate(processes) if process.poll() is None]
            assert running == [number for number in range(4) if number not in ended]
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
