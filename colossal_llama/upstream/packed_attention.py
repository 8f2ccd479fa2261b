"""torch's flash kernel for packed documents is reached in another way by each version.

Broken in: torch 2.5 to 2.9: no public function takes packed documents. Jagged nested tensors reach the
kernel, but refuse to train with fewer key/value heads than query heads. torch 2.10 added
`torch.nn.attention.varlen`, whose arguments later versions changed; 2.13's names `enable_gqa`.
Shows as: `ModuleNotFoundError: torch.nn.attention.varlen`; "No viable backend" from jagged tensors.
Cure: one function for all versions; key/value heads are repeated where the version does not say that it can
do without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention inside the documents of a flattened batch, by torch's own flash kernel.

    Attributes:
        name: which of torch's functions computes it.
        repeats_keys: keys and values are repeated for grouped queries before the kernel sees them.
        run: (query, key, value, offsets, longest document, scale) -> output, all [tokens, heads, head size];
            `offsets` are int32, on the device.
    """

    name: str
    repeats_keys: bool
    run: Callable[..., torch.Tensor]

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        offsets: torch.Tensor,
        max_length: int,
        scale: float,
    ) -> torch.Tensor:
        groups = query.size(1) // key.size(1)
        if self.repeats_keys and groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return self.run(query, key, value, offsets, max_length, scale)


def find_packed_attention() -> PackedAttention:
    """The function that the installed torch has."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return PackedAttention("torch's jagged tensors", True, _attend_jagged)
    options = varlen_options(inspect.signature(varlen_attn).parameters)
    if options is None:
        return PackedAttention("torch's jagged tensors", True, _attend_jagged)

    def attend(query: Any, key: Any, value: Any, offsets: Any, max_length: int, scale: float) -> torch.Tensor:
        return varlen_attn(
            query, key, value, offsets, offsets, max_length, max_length, scale=scale, **options
        )

    return PackedAttention("torch's varlen_attn", "enable_gqa" not in options, attend)


def varlen_options(parameters: Any) -> dict[str, Any] | None:
    """What makes `varlen_attn` causal, by the names of its arguments; None for one that can't be used.

    >>> varlen_options(["query", "key", "value", "is_causal", "return_aux", "scale"])
    {'is_causal': True}
    >>> varlen_options(["query", "key", "value", "scale", "window_size", "enable_gqa"])
    {'window_size': (-1, 0), 'enable_gqa': True}
    """
    if "scale" not in parameters:
        return None
    if "window_size" in parameters:
        options: dict[str, Any] = {"window_size": (-1, 0)}
    elif "is_causal" in parameters:
        options = {"is_causal": True}
    else:
        return None
    return {**options, "enable_gqa": True} if "enable_gqa" in parameters else options


def _attend_jagged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    max_length: int,
    scale: float,
) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # With both lengths given, nothing waits for the device to look for them.
    ragged = [
        torch.nested.nested_tensor_from_jagged(tensor, offsets, min_seqlen=1, max_seqlen=max_length)
        for tensor in (query, key, value)
    ]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = F.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in ragged), is_causal=True, scale=scale
        )
    return output.transpose(1, 2).values()
