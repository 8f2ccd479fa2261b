"""A pipeline stage that holds no parameter of a group can't train.

Broken in: colossalai 0.5.0, 3d plugin. ZeRO reads the dtype of the first parameter of the first group. And
each optimizer returns the gradient norm of an empty group at once, while the stages that have such parameters
wait for it in an all-reduce.
Shows as: IndexError while boosting where the first group is empty, else a run that stands still in its first
step. Groups are empty on stages without embeddings, and on middle stages where only the embeddings train.
Cure: a frozen placeholder, which ZeRO leaves out, gives the dtype; stages without gradients take part in the
all-reduces with zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def allow_empty_groups() -> None:
    """Lets optimizers of the 3d plugin have parameter groups that are empty on some processes."""
    from colossalai.booster.plugin.hybrid_parallel_plugin import (
        HybridParallelAMPOptimizer,
        HybridParallelNaiveOptimizer,
        HybridParallelZeroOptimizer,
    )
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    if getattr(LowLevelZeroOptimizer, "_allows_empty_groups", False):
        return
    LowLevelZeroOptimizer._allows_empty_groups = True
    make = LowLevelZeroOptimizer.__init__

    def make_with_placeholder(
        self: Any, optimizer: torch.optim.Optimizer, *args: Any, **options: Any
    ) -> None:
        groups = [group["params"] for group in optimizer.param_groups]
        if not groups[0]:
            dtype = next((parameter.dtype for group in groups for parameter in group), torch.float32)
            groups[0].append(torch.nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False))
        make(self, optimizer, *args, **options)

    LowLevelZeroOptimizer.__init__ = make_with_placeholder

    for kind in (HybridParallelNaiveOptimizer, HybridParallelAMPOptimizer):
        kind._compute_grad_norm = _norm_of_pairs(kind._compute_grad_norm)
    HybridParallelZeroOptimizer._compute_grad_norm = _norm_of_slices(
        HybridParallelZeroOptimizer._compute_grad_norm
    )


def _norm_of_pairs(compute: Any) -> Any:
    def compute_grad_norm(self: Any, param_gradient_pairs: list, norm_type: int = 2) -> float:
        if param_gradient_pairs:
            return compute(self, param_gradient_pairs, norm_type)
        return _norm_of_the_others(self.tp_pg, self.pp_pg)

    return compute_grad_norm


def _norm_of_slices(compute: Any) -> Any:
    def compute_grad_norm(self: Any, dp_pg: Any, gradients: list, norm_type: int = 2) -> float:
        if gradients:
            return compute(self, dp_pg, gradients, norm_type)
        return _norm_of_the_others(dp_pg, self.tp_pg, self.pp_pg)

    return compute_grad_norm


def _norm_of_the_others(*process_groups: Any) -> float:
    """Takes part in the sums of the squared norm, in their order, with nothing of its own."""
    from colossalai.accelerator import get_accelerator

    total = torch.zeros(1, dtype=torch.float32, device=get_accelerator().get_current_device())
    for group in process_groups:
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(total, group=group)
    return total.item() ** 0.5
