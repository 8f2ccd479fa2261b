"""Importing a part of torch's compiler starts a pool of processes.

Broken in: torch 2.5.1, `torch._inductor.async_compile`, which loading a model reaches; nothing is compiled.
Shows as: as many processes as CPU cores, up to 32, next to each process of a run, with their start-up time.
Cure: torch's own setting for the size of the pool, which it reads when it is imported.
"""

from __future__ import annotations

import os


def start_no_compile_workers() -> None:
    """Call it before torch is imported."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
