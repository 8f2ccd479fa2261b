"""Under ZeRO with one data-parallel process, gradients of earlier passes are counted again.

Broken in: colossalai 0.5.0, 3d plugin, which wraps the model in torch's DDP wherever there is one
data-parallel process, ZeRO or not. Stage 2 takes gradients away during the backward pass, once a bucket is
full or another parameter group begins; at the end of the pass DDP puts them back, and the next pass adds to
them.
Shows as: gradient norms that are too large with `--tp 2 --zero_stage 2 --accumulation_steps 2`, in models
with more parameters than a bucket (12 million), or with several parameter groups.
Cure: take DDP off, which has nobody to reduce with.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def take_ddp_off(boosted: Any) -> None:
    """Leaves the model itself in what the 3d plugin wraps around it; for ZeRO's stages 1 and 2 alone."""
    if isinstance(boosted.module, nn.parallel.DistributedDataParallel):
        boosted.module = boosted.module.module
