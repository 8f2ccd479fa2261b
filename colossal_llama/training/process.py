"""The process itself: process group and seeds, the lock on the output directory."""

from __future__ import annotations

import contextlib
import os

from colossal_llama.training.checkpoint.directories import remove_leftovers
from colossal_llama.training.resilience.interruption import StopRequest
from colossal_llama.training.settings import OptimizerSettings, OutputSettings
from colossal_llama.upstream.lean_imports import lean_imports
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
            "others that nobody starts; use torchrun or `colossalai run`, or unset WORLD_SIZE"
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
    refuse_pickled_code()
    if optimizer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with lean_imports():
        if not torch.cuda.is_available():
            from colossal_llama.upstream.cpu_training import enable_cpu_training

            enable_cpu_training()
        import colossalai
        import colossalai.booster.plugin

    colossalai.launch_from_torch(seed=optimizer.seed, verbose=False)
    # Ranks draw different dropout masks; what has to agree between ranks is drawn from generators of its own.
    torch.manual_seed(optimizer.seed * 100_003 + int(os.environ["RANK"]))
    return stop


def _free_port() -> int:
    import socket

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
