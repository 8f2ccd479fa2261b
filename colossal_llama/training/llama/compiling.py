"""`--compile`: decoder layers as graphs of torch.compile, made at their first use.

Only the layers are compiled: embeddings, loss and what plugins wrap around the model stay as they are. All
layers share their graphs. Which graph a batch gets depends on its shape alone, not on the shapes before it,
so a resumed run computes what one never stopped would.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Training and evaluation, with and without a mask, the last batch of each evaluation set: far fewer in a run.
# Beyond the limit, torch would silently compile no more.
MAX_GRAPHS = 64
# NVIDIA's GPUs that Triton, which torch's GPU graphs are written in, compiles for.
TRITON_CAPABILITY = (7, 0)


def why_no_compiling() -> str | None:
    """What keeps torch.compile from making graphs on this machine, and the remedy; None: nothing does."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < TRITON_CAPABILITY:
            found, needed = (".".join(map(str, each)) for each in (capability, TRITON_CAPABILITY))
            return f"this GPU has compute capability {found}, and graphs need {needed}; leave it out"
        variable, usual = "CC", ("gcc", "clang", "cc")
    else:
        variable, usual = "CXX", ("g++",)
    wanted = shlex.split(os.environ.get(variable, ""))[:1] or usual
    if not any(shutil.which(name) for name in wanted):
        return (
            f"torch.compile needs a C compiler, and {' or '.join(wanted)} is not on the PATH; install gcc "
            f"and g++, name one in the variable {variable}, or leave it out"
        )
    if not any(
        (Path(sysconfig.get_path(name)) / "Python.h").is_file() for name in ("include", "platinclude")
    ):
        return (
            f"torch.compile needs Python's C headers, and {sysconfig.get_path('include')} has no Python.h; "
            "install them (python3-dev), or leave it out"
        )
    return None


def compile_layers(model: LlamaForCausalLM, lengths_vary: bool, uses_flash: bool) -> None:
    """Has every decoder layer compiled at its first use; modules and the names of weights stay as they are.

    Args:
        lengths_vary: rows are padded to different lengths, so that one graph is made for all of them, not one
            for each.
        uses_flash: a kernel for packed documents computes attention.
    """
    import torch._dynamo.config
    import torch._inductor.config

    torch._dynamo.config.cache_size_limit = MAX_GRAPHS
    # It would cut graphs where DDP's buckets end; gradients of a layer are ready together here.
    torch._dynamo.config.optimize_ddp = False
    # Dropout draws the numbers that it draws uncompiled, from the generators that checkpoints hold.
    torch._inductor.config.fallback_random = True
    for layer in model.model.layers:
        if uses_flash:  # outside of the graphs, where the number of documents is no part of their shapes
            layer.self_attn.attend = torch.compiler.disable(layer.self_attn.attend)
        layer.compile(dynamic=lengths_vary)


def count_graphs() -> int:
    """Graphs that this process has made so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
