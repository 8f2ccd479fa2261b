"""Runs that are stopped, by signals or a full disk: what they save, what they say, how they go on."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import environment, start, train, wait_for_steps, workers_of
from test_resume import COMMON, ZERO2, assert_same_run, few_rows, weights_of


def test_sigterm_saves_and_exits_143(tmp_path, training_inputs):
    """Any one rank gets the signal; all of them save, exit 143, and the run can be continued exactly."""
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 0, "--num_epochs", 8]
    whole = train(tmp_path / "whole", 2, *everything)
    assert whole.returncode == 0, whole.output[-3000:]
    process = start(tmp_path / "parts", 2, *everything)
    wait_for_steps(tmp_path / "parts", 3, process)
    os.kill(workers_of(process)[1], signal.SIGTERM)
    process.wait(timeout=90)
    output = (tmp_path / "parts" / "output.txt").read_text()
    assert set(re.findall(r"exitcode\s*: (-?\d+)", output)) == {"143"}, output[-3000:]
    assert "Stopped by" in output
    resumed = train(tmp_path / "parts", 2, *everything, "--load_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert "Resumed from" in resumed.output
    assert_same_run(resumed, whole)


def test_workers_stop_when_their_launcher_is_killed(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--num_epochs", 500, "--save_interval", 0]
    process = start(tmp_path, 2, *everything)
    wait_for_steps(tmp_path, 2, process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list((tmp_path / "checkpoints").glob("epoch-*/COMPLETE")), "they save before they go"


def test_second_run_on_a_save_dir_is_refused(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--num_epochs", 500, "--save_interval", 0]
    first = start(tmp_path, 1, *everything)
    wait_for_steps(tmp_path, 1, first)
    second = train(tmp_path, 1, *everything)
    assert second.returncode != 0
    assert "in use by process" in second.output
    for pid in workers_of(first):
        os.kill(pid, signal.SIGTERM)
    first.wait(timeout=60)


def wait_until(condition, process: subprocess.Popen, output: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, output.read_text()[-3000:]
        assert time.monotonic() < deadline, output.read_text()[-3000:]
        time.sleep(0.01)


def stop_and_wait(process: subprocess.Popen, output: Path) -> str:
    """SIGTERM for all workers; returns what they printed once they have all exited with 143."""
    for pid in workers_of(process):
        os.kill(pid, signal.SIGTERM)
    process.wait(timeout=90)
    text = output.read_text()
    assert set(re.findall(r"exitcode\s*: (-?\d+)", text)) == {"143"}, text[-3000:]
    return text


def test_stopped_in_an_evaluation_it_is_done_again(tmp_path, training_inputs):
    """The evaluation of 100 data sets would take long; the stop does not wait for it."""
    parts = sorted(training_inputs.data.glob("part-*"))
    short = [*few_rows(training_inputs), *COMMON, *ZERO2, "--eval_interval", 2, "--max_steps", 3]
    copies = [tmp_path / "copies" / f"{number}" / parts[0].name for number in range(100)]
    for copy in copies:
        shutil.copytree(parts[0], copy)
    process = start(tmp_path / "run", 2, *short, "--eval_dataset", *copies)
    output = tmp_path / "run" / "output.txt"
    wait_for_steps(tmp_path / "run", 1, process)
    time.sleep(2)  # the second step, and some of the evaluation after it
    began = time.monotonic()
    assert "was cut short" in stop_and_wait(process, output)
    assert time.monotonic() - began < 30
    assert (tmp_path / "run" / "checkpoints" / "epoch-0_step-2" / "COMPLETE").is_file()
    resumed = train(tmp_path / "run", 2, *short, "--eval_dataset", *parts, "--load_checkpoint", "latest")
    whole = train(tmp_path / "whole", 2, *short, "--eval_dataset", *parts)
    assert resumed.returncode == whole.returncode == 0, resumed.output[-3000:]
    assert_same_run(resumed, whole)
    for ours, expected in zip(resumed.metrics(), whole.metrics(), strict=True):
        assert ours.get("eval_loss") == expected.get("eval_loss")
    assert [record["step"] for record in resumed.metrics() if "eval_loss" in record] == [2, 3]


def test_stopped_while_saving_both_checkpoints_are_complete(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 3, "--num_epochs", 8]
    process = start(tmp_path, 2, *everything)
    output, saves = tmp_path / "output.txt", tmp_path / "checkpoints"
    wait_until(lambda: list(saves.glob(".epoch-0_step-3.unfinished/*/*")), process, output)
    assert "Stopped by" in stop_and_wait(process, output)
    steps = sorted(int(path.parent.name.split("-")[-1]) for path in saves.glob("epoch-*/COMPLETE"))
    assert steps[0] == 3
    assert 4 <= steps[-1] <= 7
    assert not list(saves.glob(".epoch*"))


def signalled_process(same_request_seconds: float, first: int = signal.SIGINT) -> subprocess.Popen:
    """Prints `ready`, and `asked` after a signal; then it saves for two seconds and prints `saved`."""
    code = (
        "import time; from colossal_llama.training.resilience import interruption;"
        f"interruption.SAME_REQUEST_SECONDS = {same_request_seconds};"
        "stop = interruption.StopRequest(); stop.install(); print('ready', flush=True);"
        "[time.sleep(0.01) for _ in iter(lambda: stop.requested, True)]; print('asked', flush=True);"
        "time.sleep(2); print('saved')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(first)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    return process


def test_a_later_second_signal_exits_at_once():
    process = signalled_process(same_request_seconds=0)
    assert process.wait(timeout=10) == 143
    assert process.stdout.read() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_launcher_passes_on_is_the_same_request(number):
    """`pkill -f train.py` and systemd signal workers and torchrun, which passes it on to the workers."""
    process = signalled_process(same_request_seconds=5, first=number)
    assert process.wait(timeout=10) == 0
    assert process.stdout.read() == "saved\n"


def test_a_closed_terminal_is_ignored_under_nohup():
    code = (
        "import signal; from colossal_llama.training.resilience.interruption import StopRequest;"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN); stop = StopRequest(); stop.install();"
        "signal.raise_signal(signal.SIGHUP); print(stop.requested)"
    )
    finished = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert finished.stdout == "False\n", finished.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 12 MiB, unmounted in the end."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here, which takes root: {mounted.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path, training_inputs, small_disk):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 2, "--max_steps", 9]
    whole = train(tmp_path / "whole", 2, *everything)
    assert whole.returncode == 0, whole.output[-3000:]
    run, output = tmp_path / "run", tmp_path / "run" / "output.txt"
    run.mkdir()
    saves = small_disk / "checkpoints"
    (run / "checkpoints").symlink_to(saves)
    saves.mkdir()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
    process = start(run, 2, *everything)
    wait_until(lambda: "1 of 3 failures in a row" in output.read_text(), process, output)
    filler.unlink()
    process.wait(timeout=120)
    text = output.read_text()
    assert process.returncode == 0, text[-3000:]
    assert "checkpoint not saved:" in text
    assert "No space left on device; earlier checkpoints are kept, training goes on" in text
    assert weights_of(saves / "modeling") == weights_of(whole.save_dir / "modeling")
    assert list(saves.glob("epoch-*/COMPLETE"))
    assert not list(saves.glob(".epoch*")), "what was half written is removed"


def test_failures_in_a_row_end_the_run_and_keep_what_there_was(tmp_path, training_inputs, small_disk):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 1, "--num_epochs", 20]
    everything += ["--save_total_limit", 2]
    run, output = tmp_path / "run", tmp_path / "run" / "output.txt"
    run.mkdir()
    saves = small_disk / "checkpoints"
    saves.mkdir()
    (run / "checkpoints").symlink_to(saves)
    process = start(run, 2, *everything)
    wait_until(lambda: list(saves.glob("epoch-*_step-2")), process, output)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(10_000))
    process.wait(timeout=120)
    text = output.read_text()
    assert process.returncode != 0
    assert "3 times in a row" in text, text[-3000:]
    # The launcher prints a traceback of its own.
    assert 'train.py", line' not in text
    assert 1 <= len(list(saves.glob("epoch-*/COMPLETE"))) <= 3
    filler.unlink()
    resumed = train(run, 2, *everything, "--load_checkpoint", "latest", "--max_steps", 12)
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert "Resumed from" in resumed.output
    assert len(list(saves.glob("epoch-*/COMPLETE"))) == 2
    assert not list(saves.glob(".epoch*"))


@pytest.mark.slow  # two runs; tests/distributed/test_gemini.py looks at the collecting alone
@pytest.mark.parametrize("part", ["add_optimizer", "add_modeling"])
def test_one_rank_that_can_not_save_keeps_nobody_waiting(part, tmp_path, training_inputs, monkeypatch):
    """Under Gemini all ranks gather weights together while they save."""
    monkeypatch.setenv("FAIL_IN", part)
    flags = [*few_rows(training_inputs), *COMMON, "--plugin", "gemini", "--mixed_precision", "bf16"]
    flags += ["--batch_size", 4, "--accumulation_steps", 1, "--save_interval", 2, "--max_steps", 4]
    run = train(tmp_path, 2, *flags, script=Path(__file__).with_name("failing_save_train.py"), timeout=120)
    assert run.returncode == 0, run.output[-3000:]
    assert "MemoryError: no room for a copy" in run.output
    assert [path.name for path in run.save_dir.glob("epoch-*")] == ["epoch-0_step-4"]
    assert weights_of(run.save_dir / "modeling")
