"""What the canaries share.

A canary asserts that a library behaves right without a cure. It is expected to fail, with `StillBroken` and
nothing else. When it turns red, either the library is fixed and the cure can go, or the defect shows in
another way than the one that the cure was made for.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class StillBroken(Exception):
    """The defect is there, and shows as it is known to."""


def canary(defect: str) -> pytest.MarkDecorator:
    """Marks a test that sees a known defect of a library."""
    return pytest.mark.xfail(strict=True, raises=StillBroken, reason=defect)


def expect_right(outcome: str, symptom: str) -> None:
    """Passes for "right".

    Raises:
        StillBroken: the pattern `symptom` is found.
    """
    if re.search(symptom, outcome):
        raise StillBroken(outcome)
    assert outcome == "right"


def run_python(code: str, **environment: str) -> str:
    """The last line that a fresh interpreter prints, without any cure but those in `code`."""
    names = ("TORCHINDUCTOR_COMPILE_THREADS", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return (finished.stdout.strip().splitlines() or [""])[-1]


def run_processes(script: str | Path, num_processes: int, *arguments: str, timeout: float = 180) -> str:
    """Runs a script (of this directory, or by its path) on several processes, without a launcher; returns
    rank 0's output.
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    common.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / script), *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(num_processes)
    ]
    try:
        output, errors = processes[0].communicate(timeout=timeout)
        assert processes[0].returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return output
