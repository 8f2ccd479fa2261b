"""The process itself: process group and seeds, the lock on the output directory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, MutableMapping

from colossal_llama.training.checkpoint.directories import remove_leftovers
from colossal_llama.training.resilience.interruption import StopRequest
from colossal_llama.training.settings import OptimizerSettings, OutputSettings
from colossal_llama.upstream.lean_imports import lean_imports
from colossal_llama.upstream.nccl_timeout import wait_for_slow_processes
from colossal_llama.upstream.pickled_code import refuse_pickled_code
from colossal_llama.utils.errors import UserError, is_main_process
from colossal_llama.utils.files import in_use_message, lock_holder, locked_directory
from colossal_llama.utils.output_checks import why_not_writable

_LOCK_PURPOSE = "a training run"


def start_process(optimizer: OptimizerSettings) -> StopRequest:
    """Joins the process group (of one, when no launcher started this process) and seeds every generator."""
    import torch

    if os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" not in os.environ:
        raise UserError(
            f"WORLD_SIZE {os.environ['WORLD_SIZE']} is set, but no RANK: this process would wait for "
            "others that nobody starts; use torchrun or `colossalai run`, or unset WORLD_SIZE "
            "(with --dry_run it is the number of processes to plan for)"
        )
    stop = StopRequest()
    stop.install()
    for name, value in (
        ("RANK", "0"),
        ("LOCAL_RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
    ):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "0" if os.environ["WORLD_SIZE"] == "1" else "29500")
    if os.environ["MASTER_PORT"] == "0":
        os.environ["MASTER_PORT"] = str(_free_port())
    check_gpus(torch.cuda.device_count() if torch.cuda.is_available() else 0, os.environ)
    refuse_pickled_code()
    if optimizer.deterministic:
        make_deterministic(os.environ)
        torch.use_deterministic_algorithms(True)
    with lean_imports():
        if not torch.cuda.is_available():
            from colossal_llama.upstream.cpu_training import enable_cpu_training

            enable_cpu_training()
        import colossalai
        import colossalai.booster.plugin

    wait_for_slow_processes()
    colossalai.launch_from_torch(seed=optimizer.seed, verbose=False)
    # Ranks draw different dropout masks; what has to agree between ranks is drawn from generators of its own.
    torch.manual_seed(optimizer.seed * 100_003 + int(os.environ["RANK"]))
    return stop


def check_gpus(num_gpus: int, environ: Mapping[str, str]) -> None:
    """Each process of a host takes a GPU of its own.

    Args:
        num_gpus: that this process can see; 0 trains on the CPU.

    Raises:
        UserError: more processes were started here than there are GPUs.
    """
    local_rank = int(environ["LOCAL_RANK"])
    processes = max(int(environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
    if not 0 < num_gpus < processes:
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    shown = f"{num_gpus} GPUs" if num_gpus > 1 else "1 GPU"
    if visible:
        shown += f" (CUDA_VISIBLE_DEVICES={visible})"
    # On another host than the main process's, nobody else would say it.
    raise UserError(
        f"--nproc_per_node {processes}: {socket.gethostname()} shows {shown}, and each process needs one; "
        f"start --nproc_per_node {num_gpus}, or set CUDA_VISIBLE_DEVICES= to train on the CPU",
        this_rank_only=local_rank == 0,
    )


def make_deterministic(environ: MutableMapping[str, str]) -> None:
    """What `torch.use_deterministic_algorithms` does not reach; what the user has set stays.

    cuBLAS works with a buffer of one size. NCCL sums in a ring or a tree, whose order is fixed, and not
    in the switch between GPUs, whose order is not.
    """
    environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environ.setdefault("NCCL_NVLS_ENABLE", "0")
    environ.setdefault("NCCL_COLLNET_ENABLE", "0")


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def lock_save_dir(output: OutputSettings, cleanup: contextlib.ExitStack) -> None:
    """Rank 0 locks `save_dir` for the length of the run; the others hear whether that went well."""
    import torch.distributed as dist

    problems: list[list[str]] = [[]]
    if is_main_process() and not output.benchmark:
        problems[0] = find_unwritable(output)
        try:
            if not problems[0]:
                cleanup.enter_context(locked_directory(output.save_dir, _LOCK_PURPOSE))
                remove_leftovers(output.save_dir)
        except UserError as error:
            problems[0] = [f"--save_dir {error}"]
        except OSError as error:
            problems[0] = [f"--save_dir {output.save_dir}: cannot be written ({error.strerror})"]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise UserError(problems[0])


def check_outputs(output: OutputSettings) -> None:
    """What `lock_save_dir` would say, without locking or making anything."""
    problems = find_unwritable(output)
    if (holder := lock_holder(output.save_dir)) is not None:
        problems.append(f"--save_dir {in_use_message(output.save_dir, holder, _LOCK_PURPOSE)}")
    if problems:
        raise UserError(problems)


def find_unwritable(output: OutputSettings) -> list[str]:
    """A message for each output that can't be written, before hours are spent on it."""
    directories = {
        f"--save_dir {output.save_dir}": output.save_dir,
        f"--tensorboard_dir {output.tensorboard_dir}": output.tensorboard_dir,
        f"--config_file {output.config_file}": output.config_file.parent,
    }
    return [
        f"{where}: cannot be written ({reason})"
        for where, directory in directories.items()
        if (reason := why_not_writable(directory)) is not None
    ]
