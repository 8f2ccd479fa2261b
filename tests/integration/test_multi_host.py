"""Training on two hosts over real ssh: results, preflight, signals, hosts that fail."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from example_scripts import fill_in
from hosts import Host, host_environment
from launch import Run, train

HOSTFILE = "host-a\nhost-b\n"
# About 44 steps: long enough to be stopped in the middle three times.
FLAGS = {"num_epochs": 4, "save_interval": 5, "lr": "1e-3", "warmup_steps": 10}


def training_flags(training_inputs) -> list[str]:
    """What the filled-in example passes to train.py, outputs left out."""
    return [
        *("--pretrained", str(training_inputs.model), "--dataset", str(training_inputs.data / "part-00000")),
        *("--plugin", "zero2", "--batch_size", "8", "--accumulation_steps", "1", "--max_length", "96"),
        *("--weight_decay", "0.01", "--grad_clip", "1.0", "--mixed_precision", "bf16"),
        "--use_grad_checkpoint",
        *(word for flag, value in FLAGS.items() for word in (f"--{flag}", str(value))),
    ]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory, training_inputs) -> Run:
    """The same training as two processes of one host, never stopped."""
    run = train(tmp_path_factory.mktemp("one_host"), 2, *training_flags(training_inputs))
    assert run.returncode == 0, run.output[-3000:]
    return run


def assert_same_training(run: Run, expected: Run) -> None:
    for found, wanted in zip(run.metrics(), expected.metrics(), strict=True):
        for key in ("step", "tokens", "loss", "lr", "grad_norm"):
            assert found[key] == wanted[key]
    weights = (run.save_dir / "modeling" / "model.safetensors").read_bytes()
    assert weights == (expected.save_dir / "modeling" / "model.safetensors").read_bytes()


def wait_until(condition, process: subprocess.Popen, output: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        text = output.read_text(encoding="utf-8", errors="replace")
        assert process.poll() is None, text[-4000:]
        assert time.monotonic() < deadline, text[-4000:]
        time.sleep(0.05)


def wait_until_gone(hosts: tuple[Host, Host], timeout: float = 15) -> None:
    """No process of training is left on any host."""
    deadline = time.monotonic() + timeout
    while any(host.pids("train.py") for host in hosts):
        assert time.monotonic() < deadline, [host.pids("train.py") for host in hosts]
        time.sleep(0.1)


def test_two_hosts_train_like_one(tmp_path, hosts, training_inputs, one_host):
    (tmp_path / "hostfile").write_text(HOSTFILE)
    run = Run(tmp_path, 0, "")
    finished = hosts[0].run(
        *("colossalai", "run", "--nproc_per_node", 1, "--hostfile", tmp_path / "hostfile", "train.py"),
        *training_flags(training_inputs),
        *("--save_dir", run.save_dir, "--tensorboard_dir", tmp_path / "logs"),
        *("--config_file", tmp_path / "config.json", "--num_workers", 0),
    )
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert_same_training(run, one_host)


class Launch:
    """`bash train.sh` on host-a, filled in for both hosts."""

    def __init__(self, clone: Path, hosts: tuple[Host, Host], **variables: object) -> None:
        self.clone, self.hosts = clone, hosts
        self.output = clone / f"output-{len(list(clone.glob('output-*')))}.txt"
        # `set -m` needs no terminal; a session of its own makes the script's group the foreground one.
        self.process = hosts[0].start(
            *("bash", "train.sh"),
            cwd=clone,
            output=self.output,
            env={**host_environment(), **{name: str(value) for name, value in variables.items()}},
        )

    @property
    def run(self) -> Run:
        return Run(self.clone, self.process.returncode, self.text())

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def script_pid(self) -> int:
        (pid,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(pid)

    def num_steps(self) -> int:
        metrics = self.clone / "logs" / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.is_file() else 0

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.num_steps() >= step, self.process, self.output)

    def wait(self, timeout: float) -> float:
        """Seconds until the script ended; nothing of the run is left on any host then."""
        started = time.monotonic()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s\n{self.text()[-4000:]}")
        wait_until_gone(self.hosts)
        return time.monotonic() - started

    def press_ctrl_c(self) -> None:
        """SIGINT for the script's process group, as a terminal sends it."""
        for pid in self.hosts[0].pids():
            if os.getpgid(pid) == self.process.pid:
                os.kill(pid, signal.SIGINT)


@pytest.fixture
def filled_in(clone, training_inputs) -> Path:
    """The clone with a train.sh for both hosts; its outputs where `Run` looks for them."""
    (clone / "hostfile").write_text(HOSTFILE)
    settings = {
        "PROJECT_NAME": "checkpoints",
        "PARENT_SAVE_DIR": clone,
        "PARENT_TENSORBOARD_DIR": clone,
        "HOSTFILE": clone / "hostfile",
        "NPROC_PER_NODE": 1,
    }
    fill_in(clone, "train.example.sh", training_inputs, settings, FLAGS)
    text = (clone / "train.sh").read_text()
    text = text.replace('"$PARENT_TENSORBOARD_DIR/$PROJECT_NAME"', '"$PARENT_TENSORBOARD_DIR/logs"')
    (clone / "train.sh").write_text(text)
    return clone


def exit_codes(text: str) -> list[str]:
    """What torchrun reports of its workers."""
    return re.findall(r"exitcode\s+: (-?\d+)", text)


def test_stopped_killed_and_resumed_on_two_hosts(filled_in, hosts, one_host):
    """Ctrl-C, SIGTERM, a host whose processes are killed: the same command leads on to the same weights."""
    launch = Launch(filled_in, hosts)
    launch.wait_for_step(3)
    launch.press_ctrl_c()
    launch.wait(timeout=60)
    text = launch.text()
    assert launch.process.returncode == 130, text[-4000:]
    assert exit_codes(text) == ["143", "143"], text[-4000:]
    assert "Ctrl-C: every process has saved and exited with code 143" in text
    stopped_at = launch.num_steps()

    launch = Launch(filled_in, hosts)
    launch.wait_for_step(stopped_at + 3)
    os.kill(launch.script_pid(), signal.SIGTERM)
    launch.wait(timeout=60)
    text = launch.text()
    assert launch.process.returncode == 143, text[-4000:]
    assert f"step {stopped_at}," in text, "it resumed where Ctrl-C had it stopped"
    assert exit_codes(text) == ["143", "143"], text[-4000:]
    assert "SIGTERM: every process has saved and exited with code 143" in text
    stopped_at = launch.num_steps()
    assert f"step-{stopped_at}" in text.rpartition("Last complete checkpoint: ")[2]

    launch = Launch(filled_in, hosts)
    launch.wait_for_step(stopped_at + 7)
    for pid in hosts[1].training_pids():
        os.kill(pid, signal.SIGKILL)
    seconds = launch.wait(timeout=60)
    text = launch.text()
    print(f"the launch ended {seconds:.1f} s after the processes of host-b were killed")
    assert launch.process.returncode == 1, text[-4000:]
    assert "error: rank 0 on host-a: lost the connection to another process" in text
    assert re.search(r"error: host-[ab]: its processes have ended with an error", text)
    assert "Last complete checkpoint: " in text
    assert "Traceback" not in text.partition("E1")[0].partition("torch/distributed/elastic")[0]

    launch = Launch(filled_in, hosts)
    launch.wait(timeout=120)
    assert launch.process.returncode == 0, launch.text()[-4000:]
    assert_same_training(launch.run, one_host)
