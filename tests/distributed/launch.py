"""Runs the real `train.py` under `torchrun` on small data, and reads what it left."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@dataclass
class Run:
    """A finished `train.py`: its directory, exit code and output."""

    directory: Path
    returncode: int
    output: str

    @property
    def save_dir(self) -> Path:
        return self.directory / "checkpoints"

    def metrics(self) -> list[dict]:
        lines = (self.directory / "logs" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        return [record["loss"] for record in self.metrics() if record["step"]]


def environment() -> dict[str, str]:
    """One thread a process, no launcher variables of an outer run."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}


def command(
    directory: Path, num_processes: int, arguments: list[str], script: Path = ROOT / "train.py"
) -> list[str]:
    """`torchrun … train.py …` with its outputs below `directory`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}"]
    return [
        *launcher,
        f"--master_port={free_port()}",
        str(script),
        *("--save_dir", str(directory / "checkpoints")),
        *("--tensorboard_dir", str(directory / "logs")),
        *("--config_file", str(directory / "config.json")),
        *("--num_workers", "0"),
        *arguments,
    ]


def train(
    directory: Path,
    num_processes: int,
    *arguments: object,
    script: Path = ROOT / "train.py",
    timeout: float = 300,
) -> Run:
    """Runs to the end, whatever that is."""
    directory.mkdir(parents=True, exist_ok=True)
    finished = subprocess.run(
        command(directory, num_processes, [str(argument) for argument in arguments], script),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Run(directory, finished.returncode, finished.stdout)


def start(directory: Path, processes: int, *arguments: object) -> subprocess.Popen:
    directory.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command(directory, processes, [str(argument) for argument in arguments]),
        env=environment(),
        stdout=open(directory / "output.txt", "a"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_steps(directory: Path, steps: int, process: subprocess.Popen, timeout: float = 120) -> None:
    """Waits until metrics.jsonl holds `steps` records."""
    path = directory / "logs" / "metrics.jsonl"
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if path.is_file() and len(path.read_text().splitlines()) >= steps:
            return
        assert process.poll() is None, (directory / "output.txt").read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError((directory / "output.txt").read_text()[-3000:])


def workers_of(process: subprocess.Popen) -> list[int]:
    """The `train.py` processes that a launcher started."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # pid (name) state ppid …; the name may hold anything.
            pid, rest = stat.read_text().split(" ", 1)
            if int(rest.rpartition(")")[2].split()[1]) == process.pid:
                children.append(int(pid))
    return sorted(children)
