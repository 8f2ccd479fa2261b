"""Whether DDP on three gloo processes resumes bit for bit: a line without the cure, and one with it."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import nn


def gradients(ddp: nn.Module, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    ddp.zero_grad(set_to_none=True)
    ddp(torch.randn(4, 33, generator=generator)).square().mean().backward()
    return [parameter.grad.clone() for parameter in ddp.parameters()]


def compare(settle_first: bool) -> str:
    """The second step of a run against the first of one that is resumed there.

    Args:
        settle_first: have the gradient buckets arranged before, as `settle_gradient_buckets` does.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(33, 33) for _ in range(6)))
    outcomes = []
    for steps_before in (1, 0):
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model), bucket_cap_mb=0.01)
        for _ in range(settle_first + steps_before):
            gradients(ddp, 1)
        outcomes.append(gradients(ddp, 2))
    different = sum(not torch.equal(*pair) for pair in zip(*outcomes, strict=True))
    return f"{different} gradients differ" if different else "right"


def main() -> None:
    dist.init_process_group("gloo")
    for settle_first in (False, True):
        outcome = compare(settle_first)
        if dist.get_rank() == 0:
            print(outcome, flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
