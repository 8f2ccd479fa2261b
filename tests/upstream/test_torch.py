"""Canaries of torch: DDP's gradient buckets, the compiler's processes, torchrun."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest
from canaries import StillBroken, canary, expect_right, run_processes, run_python


@pytest.fixture(scope="module")
def resumed() -> list[str]:
    return run_processes("ddp_resume.py", 3).splitlines()


@canary("torch 2.5.1: ddp_bucket_order")
def test_a_resumed_ddp_run_is_the_same(resumed: list[str]) -> None:
    expect_right(resumed[0], "gradients differ")


def test_a_resumed_ddp_run_is_the_same_once_its_buckets_are_settled(resumed: list[str]) -> None:
    assert resumed[1] == "right"


COUNT_PROCESSES = """
{first}
import torch._inductor.async_compile, psutil
print("right" if not psutil.Process().children() else "processes were started")
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="one core gets no pool")
@canary("torch 2.5.1: compile_workers")
def test_importing_the_compiler_starts_no_processes() -> None:
    expect_right(run_python(COUNT_PROCESSES.format(first="")), "processes were started")


def test_no_compile_workers_once_training_is_imported() -> None:
    assert run_python(COUNT_PROCESSES.format(first="import colossal_llama.training")) == "right"


def torchrun(*command: str) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    return subprocess.Popen(
        [*launcher, "--no-python", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


@canary("torch 2.5.1: launch/preflight.py checks arguments before launching")
def test_torchrun_passes_the_exit_code_on() -> None:
    code = torchrun("bash", "-c", "exit 2").wait(60)
    expect_right("right" if code == 2 else f"exit code {code}", "exit code 1")


@canary("torch 2.5.1: training/resilience/interruption.py")
def test_workers_end_with_a_launcher_that_is_killed(tmp_path) -> None:
    note = tmp_path / "pid"
    # torchrun fills in templates: `$$` stands for `$`.
    launcher = torchrun("bash", "-c", f"echo $$$$ >{note}.new; mv {note}.new {note}; exec sleep 60")
    deadline = time.monotonic() + 60
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    worker = int(note.read_text())
    time.sleep(1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
        raise StillBroken


LONGEST_WAIT = """
import torch.distributed as dist
from torch.distributed import distributed_c10d
{first}
minutes = distributed_c10d._get_default_timeout(dist.Backend.NCCL).total_seconds() / 60
print("right" if minutes >= 30 else f"gives up after {{minutes:.0f}} minutes")
"""


@canary("torch 2.5.1: nccl_timeout")
def test_groups_on_gpus_wait_as_long_as_others() -> None:
    expect_right(run_python(LONGEST_WAIT.format(first="")), "gives up after 10 minutes")


def test_groups_on_gpus_wait_for_a_checkpoint() -> None:
    first = "from colossal_llama.upstream.nccl_timeout import *; wait_for_slow_processes()"
    assert run_python(LONGEST_WAIT.format(first=first)) == "right"


@canary("torch 2.5.1: packed_attention")
def test_packed_documents_have_a_public_function() -> None:
    expect_right("right" if importlib.util.find_spec("torch.nn.attention.varlen") else "none", "none")
