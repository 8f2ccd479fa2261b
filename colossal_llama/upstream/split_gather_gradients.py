"""Under `split_gather` with accumulation, gradients of the norms are summed again after every pass.

Broken in: colossalai 0.5.0, 3d plugin. Each tensor parallel rank has norm gradients of its part of the
sequence; after every backward pass the plugin sums what has been accumulated so far, so the first passes
count several times.
Shows as: gradient norms, and then losses, that differ from those of one process with `--accumulation_steps`
above 1.
Cure: a hook on the gradient itself sums each contribution exactly once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def sum_partial_gradients_once(model: nn.Module, tensor_group: Any) -> None:
    """Takes the summing of partial gradients over from the plugin, after boosting."""

    def sum_over_tensor_group(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=tensor_group)
        return gradient

    for parameter in model.parameters():
        if getattr(parameter, "partial_derived", False):
            parameter.partial_derived = False
            if parameter.requires_grad:
                parameter.register_hook(sum_over_tensor_group)
