"""Training on two hosts over real ssh: results, preflight, signals, hosts that fail."""

from __future__ import annotations

import contextlib
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
from support import ROOT

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
            with contextlib.suppress(ProcessLookupError):  # others come and go
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


def exit_codes(text: str) -> set[str]:
    """What torchrun reports of its workers; it says each twice.

    `colossalai run` prints pieces of the hosts' reports in turn, so not every one can be read, nor counted.
    """
    return set(re.findall(r"exitcode\s*: (-?\d+)[ )]", text))


def test_stopped_killed_and_resumed_on_two_hosts(filled_in, hosts, one_host):
    """Ctrl-C, SIGTERM, a host whose processes are killed: the same command leads on to the same weights."""
    launch = Launch(filled_in, hosts)
    launch.wait_for_step(3)
    launch.press_ctrl_c()
    launch.wait(timeout=60)
    text = launch.text()
    assert launch.process.returncode == 130, text[-4000:]
    assert exit_codes(text) == {"143"}, text[-4000:]
    assert "Ctrl-C: every process has saved and exited with code 143" in text
    stopped_at = launch.num_steps()

    launch = Launch(filled_in, hosts)
    launch.wait_for_step(stopped_at + 3)
    os.kill(launch.script_pid(), signal.SIGTERM)
    launch.wait(timeout=60)
    text = launch.text()
    assert launch.process.returncode == 143, text[-4000:]
    assert f"step {stopped_at}," in text, "it resumed where Ctrl-C had it stopped"
    assert exit_codes(text) == {"143"}, text[-4000:]
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


def test_torchrun_on_each_host(tmp_path, hosts, training_inputs, one_host):
    run = Run(tmp_path, 0, "")
    outputs = ["--save_dir", run.save_dir, "--tensorboard_dir", tmp_path / "logs"]
    started = [
        host.start(
            *("bash", "examples/launch/torchrun.sh", *training_flags(training_inputs), *outputs),
            *("--config_file", tmp_path / "config.json", "--num_workers", 0),
            output=tmp_path / f"{host.name}.txt",
            env={
                **host_environment(),
                **{"MASTER_ADDR": "host-a", "NNODES": "2", "NODE_RANK": str(rank), "NPROC_PER_NODE": "1"},
            },
        )
        for rank, host in enumerate(hosts)
    ]
    for host, process in zip(hosts, started, strict=True):
        assert process.wait(timeout=240) == 0, (tmp_path / f"{host.name}.txt").read_text()[-3000:]
    assert_same_training(run, one_host)


PREFLIGHT = ("python", "colossal_llama/launch/preflight.py", "--nproc_per_node", 1, "--timeout", 5)


def test_preflight_of_two_good_hosts(tmp_path, hosts, training_inputs):
    (tmp_path / "hostfile").write_text("host-a\n\n  host-b\n")
    save_dir = tmp_path / "runs" / "first"
    checked = hosts[0].run(
        *(*PREFLIGHT, "--hostfile", tmp_path / "hostfile", "train.py", "--save_dir", save_dir),
        *training_flags(training_inputs),
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == ""
    header, _, *lines = checked.stdout.splitlines()
    assert header.split()[:5] == ["host", "ssh", "Python", "torch", "colossalai"]
    for line, address in zip(lines, ("10.77.0.1", "10.77.0.2"), strict=True):
        assert "  ok  " in line
        assert "  2 of 2  " in line
        assert "  shared  " in line
        assert f"  eth0 {address}  " in line
    assert not save_dir.parent.exists(), "the check leaves nothing behind"


def test_preflight_names_every_problem_of_every_host(tmp_path, hosts, training_inputs):
    """host-b has other sources, no data, and storage of its own; host-a's port is taken; and a comment."""
    save_dir = tmp_path / "runs"
    save_dir.mkdir()
    (tmp_path / "version.txt").write_text("0.0.9\n")
    (tmp_path / "changed.py").write_text("# older\n")
    for mount in (
        f"mount --bind {tmp_path}/version.txt version.txt",
        f"mount --bind {tmp_path}/changed.py train.py",
        f"mount -t tmpfs tmpfs {training_inputs.data}",
        f"mount -t tmpfs tmpfs {save_dir}",
    ):
        assert hosts[1].run("bash", "-c", mount).returncode == 0
    listener = hosts[0].start(
        *("python", "-c", "import socket, time; s = socket.create_server(('', 29500)); time.sleep(99)"),
        output=tmp_path / "listener.txt",
    )
    wait_until(
        lambda: bool(hosts[0].run("ss", "-Hltn", "sport = 29500").stdout), listener, tmp_path / "listener.txt"
    )
    (tmp_path / "hostfile").write_text("host-a # the first\nhost-a\nhost-b\nhost-c\n")
    checked = hosts[0].run(
        *(*PREFLIGHT, "--hostfile", tmp_path / "hostfile", "train.py", "--save_dir", save_dir),
        *training_flags(training_inputs),
        env={**host_environment(), "GLOO_SOCKET_IFNAME": "eth9"},
    )
    listener.kill()
    assert checked.returncode == 2
    assert [line.split()[0] for line in checked.stdout.splitlines()[2:]] == ["host-a", "host-b", "host-c"]
    problems = checked.stderr.splitlines()
    version = re.escape((ROOT / "version.txt").read_text(encoding="utf-8").strip())
    for expected in (
        r'hostfile:1: "host-a # the first": `colossalai run` takes comments for host names',
        r"host-a: port 29500: Address already in use; choose another with --master_port",
        r"host-a: GLOO_SOCKET_IFNAME=eth9: no such interface .*; it has lo, eth0",
        r"host-b: GLOO_SOCKET_IFNAME=eth9: no such interface .*; it has lo, eth0",
        rf"host-b: project 0\.0\.9 \(\w+\), host-a has {version} \(\w+\); bring the sources to the same st",
        r"host-b: --dataset \S+/part-00000: no such directory; mount the storage there, or copy it",
        r"host-b: --save_dir \S+: a file written here is not seen there; checkpoints need storage",
        r"host-c: ssh failed \(.*host-c.*\); correct the name in the hostfile",
    ):
        matching = [line for line in problems if re.search(expected, line)]
        assert len(matching) == 1, (expected, problems)
        problems.remove(matching[0])
    assert problems == []


def test_host_without_ssh_is_found_before_anything_starts(filled_in, hosts):
    hosts[1].stop_sshd()
    launch = Launch(filled_in, hosts)
    launch.wait(timeout=30)
    assert launch.process.returncode == 2
    assert (
        "error: host-b: ssh failed (ssh: connect to host host-b port 22: Connection refused)" in launch.text()
    )
    assert "Starting:" not in launch.text()


def test_host_whose_ssh_never_answers_costs_no_more_than_the_time_limit(tmp_path, hosts):
    (tmp_path / "hostfile").write_text(HOSTFILE)
    assert hosts[1].run("bash", "-c", "kill -STOP $(cat /run/sshd.pid)").returncode == 0
    started = time.monotonic()
    checked = hosts[0].run(*PREFLIGHT, "--hostfile", tmp_path / "hostfile")
    assert checked.returncode == 2
    assert re.search(r"error: host-b: ssh failed \(.*timed out.*\); is it up", checked.stderr)
    assert time.monotonic() - started < 5 + 10


@pytest.mark.slow
def test_sigterm_before_training_has_begun(filled_in, hosts):
    """There is no process to signal yet; none may come up afterwards and train on."""
    launch = Launch(filled_in, hosts)
    wait_until(lambda: "Starting: colossalai run" in launch.text(), launch.process, launch.output)
    os.kill(launch.script_pid(), signal.SIGTERM)
    seconds = launch.wait(timeout=150)
    print(f"the launch ended {seconds:.1f} s after SIGTERM")
    assert launch.process.returncode == 143, launch.text()[-4000:]
    assert "training has ended without saving" in launch.text() or "saved and exited" in launch.text()
    assert launch.num_steps() < 3


@pytest.mark.slow
def test_second_signal_kills_processes_that_hang(filled_in, hosts):
    launch = Launch(filled_in, hosts)
    launch.wait_for_step(7)
    for pid in hosts[1].training_pids():
        os.kill(pid, signal.SIGSTOP)
    os.kill(launch.script_pid(), signal.SIGTERM)
    time.sleep(3)
    assert launch.process.poll() is None
    os.kill(launch.script_pid(), signal.SIGTERM)
    launch.wait(timeout=30)
    assert launch.process.returncode == 143, launch.text()[-4000:]
    assert "SIGTERM again: killing the processes of every host" in launch.text()
    assert "training has ended without saving" in launch.text()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_host_that_loses_power_in_the_middle_of_training(lost, filled_in, hosts):
    """Nothing closes connections: signs of life are missing, on whichever host is left."""
    launch = Launch(
        filled_in,
        hosts,
        COLOSSAL_LLAMA_HOST_TIMEOUT=6,
        FAILURE_GRACE_SECONDS=5,
        STOP_GRACE_SECONDS=5,
    )
    launch.wait_for_step(7)
    started = time.monotonic()
    if lost == 1:
        hosts[1].power_off()
        seconds = launch.wait(timeout=60)
        text = launch.text()
        assert launch.process.returncode != 0, text[-4000:]
        assert "error: host-a stops: host-b: no sign of life for" in text
        assert "error: host-a: its processes have ended with an error" in text
        assert "killing what is left" in text
        assert re.search(r"Last complete checkpoint: \S+/epoch-\d+_step-\d+;", text)
    else:
        hosts[0].power_off()
        wait_until_gone(hosts[1:], timeout=60)
        seconds = time.monotonic() - started
    print(f"all ended {seconds:.1f} s after {hosts[lost].name} lost its power")


SRUN = """#!/usr/bin/env bash
# A step on two nodes: the command on each of them, over ssh.
while [[ $1 == --* ]]; do shift; done
code=0
for node in 0 1; do
    words=$(printf '%q ' env PATH="$PATH" PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS=1 NPROC_PER_NODE=1 \\
        MASTER_ADDR="$MASTER_ADDR" MASTER_PORT="$MASTER_PORT" NNODES="$NNODES" SLURM_NODEID=$node "$@")
    host=host-a; ((node == 0)) || host=host-b
    ssh -oBatchMode=yes -oStrictHostKeyChecking=accept-new $host "cd $(printf %q "$PWD") && $words" \\
        </dev/null &
done
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "$2" >>requeued; else printf '%s\\n' host-a host-b; fi
"""


@pytest.mark.slow
def test_slurm_job_saves_before_its_time_limit_and_goes_on(clone, hosts, training_inputs, one_host):
    """The batch script is real; stand-ins for Slurm's two commands run its steps on the two hosts."""
    commands = clone / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    text = (clone / "examples/launch/slurm.sbatch").read_text()
    values = {
        "SAVE_DIR": clone / "checkpoints",
        "TENSORBOARD_DIR": clone / "logs",
        "CONFIG_FILE": clone / "config.json",
        "PRETRAINED_MODEL_PATH": training_inputs.model,
    }
    for name, value in values.items():
        text = text.replace(f'\n{name}=""', f'\n{name}="{value}"')
    text = text.replace(
        "declare -a dataset=(", f'declare -a dataset=("{training_inputs.data / "part-00000"}"'
    )
    for flag, value in {"max_length": 96, **FLAGS}.items():
        text, count = re.subn(rf"^    --{flag} .*", f"    --{flag} {value}", text, flags=re.MULTILINE)
        assert count == 1
    (clone / "job.sbatch").write_text(text)
    environment = {
        **host_environment(),
        **{"SLURM_SUBMIT_DIR": str(clone), "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "host-[a-b]"},
        "SLURM_JOB_NUM_NODES": "2",
    }
    environment["PATH"] = f"{commands}:{environment['PATH']}"

    def submit(number: int) -> tuple[subprocess.Popen, Path]:
        output = clone / f"slurm-{number}.log"
        return hosts[0].start("bash", "job.sbatch", cwd=clone, output=output, env=environment), output

    job, output = submit(1)
    metrics = clone / "logs" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 4, job, output)
    (pid,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(pid), signal.SIGTERM)
    job.wait(timeout=90)
    wait_until_gone(hosts)
    assert exit_codes(output.read_text()) == {"143"}, output.read_text()[-4000:]
    assert (clone / "requeued").read_text() == "77\n"
    job, output = submit(2)
    assert job.wait(timeout=240) == 0, output.read_text()[-4000:]
    assert "Resumed from" in output.read_text()
    assert_same_training(Run(clone, 0, ""), one_host)
