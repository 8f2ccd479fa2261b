"""Two steps of each plugin, its CUDA branch chosen, its tensors on the CPU: `cuda_branch_steps.py FLAGS`.

Nothing can be compiled here; flash attention and streams are stand-ins that refuse what the real ones refuse.
FLAGS are of `train.py`; `outcomes.json` beside --config_file receives rank 0's.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from stand_ins.flash import flash_attn_stand_in, torch_flash_stand_in
from stand_ins.streams import recorded_streams

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.process import start_process

BF16 = "--use_flash_attn --mixed_precision bf16"
FP16 = "--use_flash_attn --mixed_precision fp16"
# All see the same rows: two processes with rows of their own take two passes, others four.
TWO = "--accumulation_steps 2"
FOUR = "--accumulation_steps 4"
SEQUENCE = "--plugin 3d --enable_sequence_parallelism --sp_mode"
# Name -> (flags, the stand-in for flash attention).
CASES = {
    "plain": (f"--plugin ddp {TWO} --mixed_precision fp32", None),
    "ddp": (f"--plugin ddp {TWO} {BF16}", flash_attn_stand_in),
    "ddp, torch's kernel": (f"--plugin ddp {TWO} {BF16} --use_grad_checkpoint", torch_flash_stand_in),
    "ddp, fp16": (f"--plugin ddp {TWO} {FP16}", flash_attn_stand_in),
    "zero2": (f"--plugin zero2 {TWO} {BF16}", flash_attn_stand_in),
    "zero2, torch's kernel": (f"--plugin zero2 {TWO} {FP16}", torch_flash_stand_in),
    "zero2_cpu": (f"--plugin zero2_cpu {TWO} {BF16} --use_grad_checkpoint", flash_attn_stand_in),
    "3d, zero 0": (f"--plugin 3d --zero_stage 0 {TWO} {BF16}", torch_flash_stand_in),
    "3d, zero 1": (f"--plugin 3d --zero_stage 1 {TWO} {FP16}", flash_attn_stand_in),
    "3d, zero 2": (f"--plugin 3d --zero_stage 2 {TWO} {BF16}", flash_attn_stand_in),
    "3d, offload": (f"--plugin 3d --zero_cpu_offload {TWO} {BF16}", torch_flash_stand_in),
    "tp 2": (f"--plugin 3d --tp 2 {FOUR} {BF16}", torch_flash_stand_in),
    "pp 2, zero 1": (f"--plugin 3d --pp 2 {FOUR} {BF16}", flash_attn_stand_in),
    "pp 2, zero 0": (f"--plugin 3d --pp 2 --zero_stage 0 {FOUR} {BF16}", torch_flash_stand_in),
    "split_gather": (f"{SEQUENCE} split_gather --tp 2 {FOUR} {BF16}", flash_attn_stand_in),
    "all_to_all": (f"{SEQUENCE} all_to_all --sp 2 {FOUR} {BF16}", torch_flash_stand_in),
    "gemini": (f"--plugin gemini {TWO} {BF16}", flash_attn_stand_in),
    "gemini, fp16": (f"--plugin gemini {TWO} {FP16}", torch_flash_stand_in),
    "gemini_auto": (f"--plugin gemini_auto {TWO} {BF16}", torch_flash_stand_in),
}
NO_COMPILER = "nothing can be compiled here"


def remove_compilers() -> None:
    """As on a machine that has a GPU's driver and the wheels, nothing else."""
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(NO_COMPILER)

    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "CC", "CXX"):
        os.environ.pop(name, None)
    os.environ["PATH"] = "/nowhere"
    cpp_extension.CUDA_HOME = None
    for name in ("load", "load_inline", "_jit_compile", "_write_ninja_file_and_build_library"):
        setattr(cpp_extension, name, refuse)
    start = subprocess.Popen.__init__

    def start_no_compiler(self: Any, args: Any, *rest: Any, **options: Any) -> None:
        words = [args] if isinstance(args, (str, os.PathLike)) else args
        if Path(str(words[0]).split()[0]).name in ("nvcc", "ninja", "gcc", "g++", "cc", "c++", "clang"):
            raise FileNotFoundError(NO_COMPILER)
        start(self, args, *rest, **options)

    subprocess.Popen.__init__ = start_no_compiler


def choose_cuda_branch() -> None:
    """Plugins believe that they run on an H100; what they ask of it is answered."""
    from colossal_llama.training.plugins.base import Plugin
    from colossal_llama.upstream.gemini_on_cpu import let_gemini_run_on_cpus

    # Gemini's memories are those of a CPU, which it decides while it is started; its kernels are a GPU's.
    Plugin.on_gpu = property(lambda self: "gemini" not in self.name or hasattr(self, "booster"))
    let_gemini_run_on_cpus()
    torch.cuda.get_device_capability = lambda *_: (9, 0)


class PackedRows:
    """Rows of three documents each."""

    def __init__(self) -> None:
        self.bucket_ranges = [[(0, 64)]]
        self.num_tokens = 64 * 32
        self.fingerprint = "packed rows"
        self.sets: list[Any] = []

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        from colossal_llama.training.data.rows import Row

        tokens = np.random.default_rng(index).integers(3, 128, 32)
        return Row(tokens, tokens, np.array([10 + index % 7, 9, 13 - index % 7]))

    def describe_row(self, index: int) -> str:
        return f"row {index}"


def steps_of(flags: list[str], stop: Any) -> dict[str, Any]:
    """Two steps; what they computed, and with what."""
    from colossal_llama.training.loop import TrainingLoop
    from colossal_llama.training.reporting.kernels import describe_kernels
    from colossal_llama.training.run import Run
    from colossal_llama.training.state import TrainState

    run = Run.prepare(parse_settings(flags), torch.distributed.get_world_size(), PackedRows())
    with recorded_streams() as recorder:
        run.plugin.start()
        run.boost()
        loop = TrainingLoop(run, TrainState(), None, None, stop)
        batches = loop.batches()
        records = [loop.step(batches).record for _ in range(2)]
    optimizer = run.plugin.optimizer.optim
    return {
        "losses": [record["loss"] for record in records],
        "norms": [record["grad_norm"] for record in records],
        "is_torchs": isinstance(optimizer, torch.optim.AdamW),
        "fused": all(group["fused"] for group in optimizer.param_groups),
        "races": recorder.races,
        "nondeterministic": sorted(recorder.nondeterministic),
        "streams": len(recorder.streams),
        "kernels": describe_kernels(run.plugin),
        "problems": list(run.plugin.flash_problems),
    }


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield None


def look_at(name: str, arguments: list[str], stop: Any) -> dict[str, Any]:
    from colossal_llama.training.llama.flash import find_flash_kernel

    flags, stand_in = CASES[name]
    find_flash_kernel.cache_clear()
    with (stand_in or nothing)() as calls:
        outcome = steps_of([*arguments, *flags.split()], stop)
    if calls is not None:
        outcome["forwards"] = calls.forwards
        outcome["deterministic"] = sorted(set(calls.deterministic))
        outcome["dtypes"] = sorted(map(str, calls.dtypes))
        outcome["documents"] = max(calls.num_documents, default=0)
    return outcome


def compile_an_optimizer() -> str:
    """That compilers are gone shows here."""
    from colossalai.nn.optimizer import HybridAdam

    parameter = torch.nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    try:
        HybridAdam([parameter]).step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "compiled"


def main() -> None:
    arguments = sys.argv[1:]
    settings = parse_settings(arguments)
    remove_compilers()
    stop = start_process(settings.optimizer)
    choose_cuda_branch()
    outcomes: dict[str, Any] = {"compiling": compile_an_optimizer()}
    for name in CASES:
        try:
            outcomes[name] = look_at(name, arguments, stop)
        except Exception:
            outcomes[name] = {"error": traceback.format_exc()}
        if torch.distributed.get_rank() == 0:
            target = settings.output.config_file.with_name("outcomes.json")
            target.write_text(json.dumps(outcomes, indent=1), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
