"""flash-attn and torch's own flash kernel on a CPU: slow attention behind the checks that the kernels make.

The checks are those of flash-attn 2's `mha_varlen_fwd` (csrc/flash_attn/flash_api.cpp) and of torch's copy of
it, except that tensors are on the CPU.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Calls:
    """What a stand-in was called with.

    Attributes:
        deterministic: of each backward pass.
    """

    forwards: int = 0
    deterministic: list[bool] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    num_documents: list[int] = field(default_factory=list)
    causal: set[bool] = field(default_factory=set)
    heads: set[tuple[int, int]] = field(default_factory=set)


def check(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: Any
) -> None:
    """The kernels' own refusals, in their words."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise RuntimeError(message)

    require(
        query.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type"
    )
    require(key.dtype == query.dtype, "query and key must have the same dtype")
    require(value.dtype == query.dtype, "query and value must have the same dtype")
    require(offsets.dtype == torch.int32, "cu_seqlens_q must have dtype int32")
    require(offsets.device == query.device, "cu_seqlens_q must be on CUDA")
    require(offsets.is_contiguous(), "cu_seqlens_q must be contiguous")
    for tensor in (query, key, value):
        require(tensor.dim() == 3, "expected [tokens, heads, head size]")
        require(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
        require(tensor.size(-1) == query.size(-1), "head sizes differ")
    require(query.size(-1) <= 256, "FlashAttention forward only supports head dimension at most 256")
    require(query.size(-1) % 8 == 0, "head_size should be a multiple of 8")
    require(
        query.size(1) % key.size(1) == 0, "Number of heads in key/value must divide number of heads in query"
    )
    require(key.shape == value.shape, "key and value must have one shape")
    require(isinstance(longest, int), "max_seqlen must be an int")
    lengths = offsets.diff()
    require(int(offsets[0]) == 0 and int(offsets[-1]) == query.size(0), "offsets must cover all tokens")
    require(bool((lengths > 0).all()) and int(lengths.max()) <= longest, "max_seqlen is too small")


def probabilities(query: torch.Tensor, key: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """[heads, queries, keys] of one document, fp32."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), repeat(key, query).float()) * scale
    if causal:
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores.softmax(-1)


def repeat(key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    return key.repeat_interleave(query.size(1) // key.size(1), dim=1)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
    causal: bool,
) -> torch.Tensor:
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v = (tensor[start:end] for tensor in (query, key, value))
        attention = probabilities(q, k, scale, causal)
        output[start:end] = torch.einsum("hqk,khd->qhd", attention, repeat(v, q).float()).to(query.dtype)
    return output


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Written out: a kernel for a device is called below autograd."""
    gradients = tuple(torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (query, key, value))
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        q, k, v, g = (tensor[start:end].float() for tensor in (query, key, value, gradient))
        attention = probabilities(q, k, scale, causal)
        towards = torch.einsum("qhd,khd->hqk", g, repeat(v, q))
        scores = attention * (towards - (towards * attention).sum(-1, keepdim=True)) * scale
        per_head = (
            torch.einsum("hqk,khd->qhd", scores, repeat(k, q)),
            torch.einsum("hqk,qhd->khd", scores, q),
            torch.einsum("hqk,qhd->khd", attention, g),
        )
        for target, found in zip(gradients, per_head, strict=True):
            summed = found.unflatten(1, (target.size(1), -1)).sum(2)
            target[start:end] = summed.to(target.dtype)
    return gradients


def _note(calls: Calls, query: torch.Tensor, key: torch.Tensor, offsets: torch.Tensor, causal: bool) -> None:
    calls.forwards += 1
    calls.dtypes.add(query.dtype)
    calls.num_documents.append(offsets.numel() - 1)
    calls.causal.add(causal)
    calls.heads.add((query.size(1), key.size(1)))


@contextlib.contextmanager
def flash_attn_stand_in(knows_deterministic: bool = True) -> Iterator[Calls]:
    """A `flash_attn` that can be imported.

    Args:
        knows_deterministic: versions before 2.4.1 don't.
    """
    calls = Calls()

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, offsets, scale, causal, deterministic):
            ctx.save_for_backward(query, key, value, offsets)
            ctx.options = (scale, causal)
            ctx.deterministic = deterministic
            return forward(query, key, value, offsets, scale, causal)

        @staticmethod
        def backward(ctx, gradient):
            calls.deterministic.append(ctx.deterministic)
            return (*backward(gradient, *ctx.saved_tensors, *ctx.options), None, None, None, None)

    def call(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, flag):
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert max_seqlen_q == max_seqlen_k
        check(q, k, v, cu_seqlens_q, max_seqlen_q)
        _note(calls, q, k, cu_seqlens_q, causal)
        return Attention.apply(q, k, v, cu_seqlens_q, softmax_scale or q.size(-1) ** -0.5, causal, flag)

    def with_flag(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        return call(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale,
            causal,
            deterministic,
        )

    def without_flag(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
    ):
        return call(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, False
        )

    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = with_flag if knows_deterministic else without_flag
    before = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = module
    try:
        yield calls
    finally:
        if before is None:
            del sys.modules["flash_attn"]
        else:
            sys.modules["flash_attn"] = before


@contextlib.contextmanager
def torch_flash_stand_in() -> Iterator[Calls]:
    """torch's flash kernel for the CPU: `aten::_flash_attention_forward` and `_backward`.

    torch's own code around it runs: jagged tensors, their checks and `varlen_attn`. torch asks the build
    whether it has the kernel, and is answered that it has.
    """
    from torch.nested._internal import sdpa

    calls = Calls()

    def run_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, **more):
        assert torch.equal(cu_q, cu_k)
        assert dropout == 0.0
        check(q, k, v, cu_q, max_q)
        assert q.size(1) == k.size(1) or more, "torch 2.5's is not known to train with grouped queries"
        _note(calls, q, k, cu_q, causal)
        nothing = torch.zeros((), dtype=torch.int64)
        logsumexp = torch.zeros(q.size(1), q.size(0))
        output = forward(q, k, v, cu_q, scale or q.size(-1) ** -0.5, causal)
        return output, logsumexp, nothing, nothing.clone(), torch.empty(0)

    def run_backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout,
        causal,
        seed,
        offset,
        *,
        scale=None,
        **more,
    ):
        # The real one asks the same global switch.
        calls.deterministic.append(torch.are_deterministic_algorithms_enabled())
        return backward(grad, q, k, v, cu_q, scale or q.size(-1) ** -0.5, causal)

    library = torch.library.Library("aten", "IMPL")
    asked, sdpa.can_use_flash_attention = sdpa.can_use_flash_attention, lambda *_, **__: True
    try:
        library.impl("_flash_attention_forward", run_forward, "CPU")
        library.impl("_flash_attention_backward", run_backward, "CPU")
        yield calls
    finally:
        library._destroy()
        sdpa.can_use_flash_attention = asked
