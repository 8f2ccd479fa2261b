"""Flash attention over packed documents: the package flash-attn where it runs, else torch's own kernel.

Which of them is used is decided once, by comparing a forward and a backward pass over a few tokens with plain
attention: wheels can be built for other GPUs or for another torch, and kernels have limits of their own.
Without one, isolated documents go through a mask of rows x rows, which computes the same, slowly.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from colossal_llama.upstream.packed_attention import PackedAttention, find_packed_attention
from colossal_llama.utils.messages import first_line

# Both kernels: of NVIDIA GPUs from Ampere on, in half precision.
MIN_CAPABILITY = (8, 0)
MAX_HEAD_SIZE = 256
HEAD_SIZE_MULTIPLE = 8
# A few roundings of bf16 in values around 1.
TOLERANCE = 5e-2


class FlashKernel(PackedAttention):
    """A kernel for causal attention inside documents; its name is for the first log lines.

    Tensors are [tokens, heads, head size] of one half-precision dtype, `offsets` int32 [documents + 1].
    """


def flash_attn_package(deterministic: bool) -> FlashKernel:
    """The package flash-attn.

    Raises:
        ImportError: it is not there, or not usable.
    """
    from flash_attn import flash_attn_varlen_func

    options = {}
    if deterministic:
        if "deterministic" not in inspect.signature(flash_attn_varlen_func).parameters:
            raise ImportError("this version has no deterministic backward pass; 2.4.1 and later have")
        options["deterministic"] = True

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        offsets: torch.Tensor,
        max_length: int,
        scale: float,
    ) -> torch.Tensor:
        return flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=max_length,
            max_seqlen_k=max_length,
            softmax_scale=scale,
            causal=True,
            **options,
        )

    try:
        name = f"flash-attn {version('flash-attn')}"
    except PackageNotFoundError:
        name = "flash-attn"
    return FlashKernel(name, False, attend)


def torch_kernel(deterministic: bool) -> FlashKernel:
    """torch's own; its backward pass obeys `torch.use_deterministic_algorithms`."""
    packed = find_packed_attention()
    return FlashKernel(f"flash attention by {packed.name}", packed.repeats_keys, packed.run)


# In order of preference: name for messages -> what makes the kernel.
FLASH_KERNELS: dict[str, Callable[[bool], FlashKernel]] = {
    "flash-attn": flash_attn_package,
    "torch's own": torch_kernel,
}


def why_no_flash(capability: tuple[int, int], head_size: int) -> str | None:
    """What keeps every flash kernel from running; None where nothing does."""
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, each)) for each in (capability, MIN_CAPABILITY))
        return f"this GPU has compute capability {found}, and flash attention needs {needed}"
    if head_size % HEAD_SIZE_MULTIPLE or head_size > MAX_HEAD_SIZE:
        return (
            f"the model's head size is {head_size}, and flash attention takes multiples of "
            f"{HEAD_SIZE_MULTIPLE} up to {MAX_HEAD_SIZE}"
        )
    return None


@functools.cache
def find_flash_kernel(
    heads: int, key_heads: int, head_size: int, dtype: torch.dtype, device: torch.device, deterministic: bool
) -> tuple[FlashKernel | None, tuple[str, ...]]:
    """The first kernel that is right on this device for such a model, and why none before it is used."""
    reasons = []
    for name, make in FLASH_KERNELS.items():
        try:
            kernel = make(deterministic)
            _try_out(kernel, heads, key_heads, head_size, dtype, device)
        except Exception as error:  # kernels raise anything
            reasons.append(f"{name}: {first_line(error)}")
        else:
            return kernel, tuple(reasons)
    return None, tuple(reasons)


def _try_out(
    kernel: FlashKernel, heads: int, key_heads: int, head_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Compares both directions with plain attention, over two documents.

    Raises:
        RuntimeError: values differ; and whatever the kernel raises.
    """
    lengths, scale = [3, 5], head_size**-0.5

    def values(seed: int, count: int) -> torch.Tensor:
        # No generator: what training draws must not depend on this.
        numbers = torch.arange(sum(lengths) * count * head_size, dtype=torch.float32, device=device)
        return (numbers * (seed + 0.7)).sin().view(sum(lengths), count, head_size).to(dtype)

    inputs = [values(0, heads), values(1, key_heads), values(2, key_heads)]
    weight = values(3, heads)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
    with torch.enable_grad():
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        output = kernel(*given, offsets, max(lengths), scale)
        found = [output, *torch.autograd.grad(output, given, weight)]
        plain = [tensor.float().requires_grad_() for tensor in inputs]
        documents = zip(*(tensor.split(lengths) for tensor in plain), strict=True)
        output = torch.cat([_plain_attention(*document, scale) for document in documents])
        expected = [output, *torch.autograd.grad(output, plain, weight.float())]
    for ours, wanted in zip(found, expected, strict=True):
        if not torch.allclose(ours.float(), wanted, rtol=TOLERANCE, atol=TOLERANCE):
            worst = float((ours.detach().float() - wanted.detach()).abs().max())
            raise RuntimeError(f"its values differ from plain attention's by {worst:.2g}")


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Of one document, [tokens, heads, head size]."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    future = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(future, float("-inf")).softmax(-1), value)
