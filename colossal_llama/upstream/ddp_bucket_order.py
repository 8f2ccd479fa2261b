"""A run on three or more processes that is resumed differs from one that was never stopped.

Broken in: torch 2.5.1, DistributedDataParallel. It arranges its gradient buckets once after the first
backward pass; from three ranks on, other buckets mean sums in another order, and the first step after a
resume has the first arrangement again.
Shows as: losses that differ in the last bits from the second step of a resumed run on.
Cure: have it arrange the buckets before training, by a pass whose gradients are thrown away.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from colossal_llama.training.plugins.base import Plugin


def settle_gradient_buckets(plugin: Plugin) -> None:
    """Makes DDP arrange its gradient buckets now; nothing where there is no DDP or two processes at most."""
    wrapped = (m for m in plugin.model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
    ddp = next(wrapped, None)
    if ddp is None or ddp.process_group.size() < 3:
        return
    shape = (1, 8 * plugin.layout.length_multiple)
    zeros = torch.zeros(shape, dtype=torch.int64, device=plugin.device)
    batch = dict.fromkeys(("input_ids", "position_ids", "labels", "attention_mask"), zeros)
    noise, plugin.causal_lm.embedding_noise = plugin.causal_lm.embedding_noise, None
    plugin.model.train()
    # Dropout must not use up random numbers here.
    with torch.random.fork_rng(devices=[plugin.device] if plugin.on_gpu else []):
        plugin.train_pass(batch, 0.0, contextlib.nullcontext)
    plugin.optimizer.optim.zero_grad(set_to_none=True)
    plugin.causal_lm.embedding_noise = noise
