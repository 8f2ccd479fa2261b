"""Pipelines read names of torch that only builds with Huawei's HCCL define.

Broken in: colossalai 0.5.0, `pipeline/p2p.py`: `Backend.HCCL` and `is_hccl_available`.
Shows as: AttributeError in the first pass with `--pp 2` under gloo.
Cure: define them.
"""

from __future__ import annotations

import torch.distributed as dist


def define_hccl_names() -> None:
    """Defines the names, as of a backend that is not available."""
    import torch.distributed.distributed_c10d as c10d

    if not hasattr(c10d.Backend, "HCCL"):
        c10d.Backend.HCCL = "hccl"
    if not hasattr(dist, "is_hccl_available"):
        dist.is_hccl_available = lambda: False
