"""Rotary scaling that depends on the length takes that of the longest row so far, not the document's own.

Broken in: transformers 4.51.3: `dynamic` and `longrope` scaling look at the largest position of the batch,
and `dynamic` keeps the frequencies that a longer batch has left behind.
Shows as: the loss of a document depends on what it shares a batch with, on the batches before, and so on
the layout; a resumed run differs from one never stopped.
Cure: each document gets the frequencies that it would have alone, in a model that has seen nothing before.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

DEPENDENT_TYPES = ("dynamic", "longrope")


def rotate_documents_alone(model: nn.Module) -> None:
    """Makes every rotary embedding inside `model` look at documents, not at the batch."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for module in model.modules():
        if isinstance(module, LlamaRotaryEmbedding) and module.rope_type in DEPENDENT_TYPES:
            module.forward = MethodType(_forward, module)


def document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Length of the document that each token belongs to, [rows, length]; position 0 begins a document.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1]])).tolist()
    [[3, 3, 3, 2, 2]]
    """
    document = (position_ids == 0).long()
    document[:, 0] = 1
    document = document.cumsum(1) - 1
    counts = torch.zeros_like(document).scatter_add_(1, document, torch.ones_like(document))
    return counts.gather(1, document)


@torch.no_grad()
def _forward(
    self: LlamaRotaryEmbedding, x: torch.Tensor, position_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`LlamaRotaryEmbedding.forward`, with frequencies for each token."""
    native = getattr(self.config, "original_max_position_embeddings", None)
    if native is None or self.rope_type == "dynamic":
        native = self.config.max_position_embeddings
    frequencies = self.rope_init_fn(self.config, x.device)[0].float().expand(*position_ids.shape, -1)
    lengths = document_lengths(position_ids)
    longer = torch.unique(lengths[lengths > native]).tolist()
    if longer:
        frequencies = frequencies.clone()
    for length in longer:
        frequencies[lengths == length] = self.rope_init_fn(self.config, x.device, seq_len=length)[0].float()
    with torch.autocast(x.device.type, enabled=False):
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
    return cos.to(x.dtype), sin.to(x.dtype)
