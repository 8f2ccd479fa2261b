"""One attention for every layout: causal, and blind to the other documents of a row.

The plugins bring attention forwards of their own; some drop the causal mask (sequence parallelism without
a flash kernel), none isolates packed documents. After boosting, the forwards of all `LlamaAttention`
modules are replaced by the one here, and the mask that reaches them is made from `document_index`, one
integer a token:

    tokens           a b c | d e | . .        three tokens, two tokens, padding
    document_index   0 0 0   1 1  -1 -1       padding is a document of its own
    token e attends to d and e

`document_index` travels in the place of the `attention_mask` argument, so pipelines cut it into
microbatches and gradient checkpointing keeps it beside its activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from colossal_llama.training.llama.flash import FlashKernel


@dataclass
class AttentionLayout:
    """Which key each query may see, in the form that the kernel at hand wants.

    Attributes:
        block_mask: [batch, 1, sequence, sequence] bool, or None when plain causal attention is meant.
        flash: kernel for packed documents; None for torch's attention with the mask.
        cu_seqlens: int32 offsets of the documents in the flattened batch, for `flash`.
        max_seqlen: longest document, in tokens.
    """

    block_mask: torch.Tensor | None = None
    flash: FlashKernel | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int = 0


def make_attention_layout(document_index: torch.Tensor | None, flash: FlashKernel | None) -> AttentionLayout:
    """Turns [batch, sequence] document numbers into an `AttentionLayout`."""
    if document_index is None:
        return AttentionLayout()
    if flash is not None:
        starts = torch.ones_like(document_index, dtype=torch.bool)
        starts[:, 1:] = document_index[:, 1:] != document_index[:, :-1]
        offsets = starts.flatten().nonzero().flatten()
        offsets = torch.cat([offsets, offsets.new_tensor([document_index.numel()])]).to(torch.int32)
        return AttentionLayout(flash=flash, cu_seqlens=offsets, max_seqlen=int(offsets.diff().max()))
    if bool((document_index == document_index[:, :1]).all()):
        return AttentionLayout()
    sequence = document_index.size(1)
    causal = torch.ones(sequence, sequence, dtype=torch.bool, device=document_index.device).tril()
    same_document = document_index[:, :, None] == document_index[:, None, :]
    return AttentionLayout(block_mask=(same_document & causal)[:, None])


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: AttentionLayout, scale: float
) -> torch.Tensor:
    """Causal attention inside documents.

    Args:
        query: [batch, heads, sequence, head size]; `key` and `value` may have fewer heads (grouped-query
            attention).

    Returns:
        [batch, sequence, heads, head size]
    """
    if layout.flash is not None:
        batch, _, sequence, _ = query.shape
        # Under autocast queries and keys leave the rotary embedding in fp32, which kernels refuse.
        flat = [tensor.transpose(1, 2).flatten(0, 1).to(value.dtype) for tensor in (query, key, value)]
        output = layout.flash(*flat, layout.cu_seqlens, layout.max_seqlen, scale)
        return output.unflatten(0, (batch, sequence))
    groups = query.size(1) // key.size(1)
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=layout.block_mask, is_causal=layout.block_mask is None, scale=scale
    )
    return output.transpose(1, 2)


def attention_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: AttentionLayout | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """The forward of `LlamaAttention`: projections (sharded or not), rotary embedding, attention.

    Under Ulysses sequence parallelism (`all_to_all`) each rank comes in with all heads of a part of the
    sequence, attends with a part of the heads over the whole sequence, and goes out as it came in.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
    group = self.ulysses_group
    if group is not None:
        from colossalai.shardformer.layer._operation import all_to_all_comm

        query, key, value = (all_to_all_comm(tensor, group) for tensor in (query, key, value))
    batch, sequence = query.shape[:2]
    query, key, value = (
        tensor.view(batch, sequence, -1, self.head_dim).transpose(1, 2) for tensor in (query, key, value)
    )
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    output = self.attend(query, key, value, attention_mask or AttentionLayout(), self.scaling)
    output = output.reshape(batch, sequence, -1)
    if group is not None:
        output = all_to_all_comm(output, group, scatter_dim=1, gather_dim=2)
    return self.o_proj(output), None


def install_attention(model: nn.Module, flash: FlashKernel | None = None, ulysses_group: Any = None) -> None:
    """Gives every `LlamaAttention` and `LlamaModel` inside `model` the forward and the mask of this module.

    Args:
        flash: kernel for packed documents, instead of torch's scaled dot-product attention with a mask.
        ulysses_group: the process group of `all_to_all` sequence parallelism, None otherwise.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

    def layout_from_document_index(self: nn.Module, attention_mask: Any, *args: Any, **kwargs: Any):
        return make_attention_layout(attention_mask, flash)

    for module in model.modules():
        if isinstance(module, LlamaAttention):
            module.ulysses_group, module.attend = ulysses_group, attend
            module.forward = MethodType(attention_forward, module)
        elif isinstance(module, LlamaModel):
            module._update_causal_mask = MethodType(layout_from_document_index, module)
