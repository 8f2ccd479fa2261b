"""gloo lacks the collectives that ZeRO and sequence parallelism use.

Broken in: torch 2.5.1 with gloo: no reduce-scatter, no all-to-all.
Shows as: "ProcessGroupGloo does not support reduce_scatter" on a CPU.
Cure: compose them from all-reduce and all-gather where the backend of the group is gloo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class _FinishedWork:
    """The handle of a collective that has already run."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def compose_missing_collectives() -> None:
    """Replaces the functions of `torch.distributed`; groups of other backends go to the originals."""
    if getattr(dist, "_composed_for_gloo", False):
        return

    def finish(async_op: bool) -> _FinishedWork | None:
        return _FinishedWork() if async_op else None

    def for_gloo(composed: Callable, original: Callable) -> Callable:
        def call(
            output: Any, input: Any, *args: Any, group: Any = None, async_op: bool = False, **kwargs: Any
        ):
            if dist.get_backend(group) != "gloo":
                return original(output, input, *args, group=group, async_op=async_op, **kwargs)
            composed(output, input, *args, group=group, **kwargs)
            return finish(async_op)

        return call

    def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None):
        total = input.clone()
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))

    def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None):
        total = torch.stack([tensor.contiguous() for tensor in input_list])
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total[dist.get_rank(group)])

    def all_to_all(output_list, input_list, group=None):
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        flat = torch.cat([tensor.reshape(-1) for tensor in input_list])
        sizes = torch.tensor([tensor.numel() for tensor in input_list])
        all_sizes = [torch.empty_like(sizes) for _ in range(world_size)]
        dist.all_gather(all_sizes, sizes, group=group)
        longest = max(int(each.sum()) for each in all_sizes)
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        gathered = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(gathered, padded, group=group)
        for source in range(world_size):
            start = int(all_sizes[source][:rank].sum())
            end = start + int(all_sizes[source][rank])
            output_list[source].copy_(gathered[source][start:end].view_as(output_list[source]))

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None):
        world_size = dist.get_world_size(group)
        send = list(input.split(input_split_sizes or input.size(0) // world_size))
        receive = list(output.split(output_split_sizes or output.size(0) // world_size))
        all_to_all(receive, send, group=group)

    for composed in (reduce_scatter_tensor, reduce_scatter, all_to_all, all_to_all_single):
        setattr(dist, composed.__name__, for_gloo(composed, getattr(dist, composed.__name__)))
    dist._composed_for_gloo = True
