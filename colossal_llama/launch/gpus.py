"""The GPUs of this machine, as `nvidia-smi` lists them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

NVIDIA_SMI_SECONDS = 40


@dataclass(frozen=True)
class Gpu:
    index: int
    used_mib: float


def list_gpus() -> list[Gpu]:
    """Empty where there is no `nvidia-smi`, or where it fails; the pre-flight check says why it does."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            query,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=NVIDIA_SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    if done.returncode != 0:
        return []
    return [_parse(line) for line in done.stdout.splitlines() if line.strip()]


def _parse(line: str) -> Gpu:
    index, used = (word.strip() for word in line.split(","))
    # Some GPUs share the machine's memory and have no number here: `[N/A]`.
    return Gpu(int(index), float(used) if used.isdigit() else 0.0)


def least_used(gpus: Sequence[Gpu], count: int) -> list[int]:
    """Indices of the `count` GPUs with the least memory in use, the emptiest first."""
    return [gpu.index for gpu in sorted(gpus, key=lambda gpu: (gpu.used_mib, gpu.index))][:count]
