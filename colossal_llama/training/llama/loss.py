"""The summed next-token loss, computed without ever holding the logits of a whole batch."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from colossal_llama.dataset.labels import NO_LOSS_LABEL

# Logits of one chunk: 64 Mi values are 256 MiB in fp32.
MAX_CHUNK_VALUES = 64 * 1024 * 1024
# Device type that the fused kernel is for; tests say "any" and run it in Triton's interpreter.
USE_LIGER_ON = "cuda"
# The kernel's arguments differ between versions; these were run. 0.6.3 has more of them.
TESTED_LIGER_VERSIONS = ("0.5.10",)


@functools.cache
def why_no_liger() -> str | None:
    """What keeps liger's kernel from being used; None where nothing does. Does not import it."""
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return "not found"
    if found not in TESTED_LIGER_VERSIONS:
        return f"{found} found, not used: tested is {', '.join(TESTED_LIGER_VERSIONS)}"
    if "TRITON_INTERPRET" not in os.environ:
        # Triton compiles a launcher for each kernel; nvcc is in its wheel, a C compiler is not.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return f"{found} found, not used: Triton needs a C compiler, and there is none"
        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            return f"{found} found, not used: Triton needs Python.h (Debian, Ubuntu: apt install python3-dev)"
    return None


@functools.cache
def liger_kernel() -> Any:
    """liger's fused cross-entropy kernel, or None where it can't be used."""
    if why_no_liger() is not None:
        return None
    try:
        from liger_kernel.ops import cross_entropy
    except Exception:  # an ImportError, or what another Triton than it was made for raises
        return None
    return cross_entropy


def _fused_cross_entropy(
    module: Any, logits: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row in fp32 and d loss / d logits, which overwrites `logits`.

    liger's own Python function rounds the losses to the dtype of the logits and waits for the device; its
    kernel, launched here, does neither.
    """
    num_rows, num_columns = logits.shape
    losses = torch.zeros(num_rows, dtype=torch.float32, device=logits.device)
    module.liger_cross_entropy_kernel[(num_rows,)](
        X_ptr=logits,
        X_stride=logits.stride(0),
        Y_ptr=target,
        Y_stride=target.stride(0),
        weight_ptr=None,
        loss_ptr=losses,
        z_loss_ptr=None,
        loss_stride=losses.stride(0),
        n_cols=num_columns,
        n_non_ignore=1,
        sum_non_ignore_weight=1,
        weight_sum=0.0,
        ignore_index=NO_LOSS_LABEL,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="sum",
        softcap=None,
        RETURN_Z_LOSS=False,
        BLOCK_SIZE=min(module.MAX_FUSED_SIZE, 1 << (num_columns - 1).bit_length()),
        HAS_WEIGHT=False,
        HAS_SOFTCAPPING=False,
        num_warps=32,
    )
    return losses, logits


def _cross_entropy(
    logits: torch.Tensor, target: torch.Tensor, vocab_start: int, group: Any, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Loss of each row in fp32 and d loss / d logits (None unless asked for); overwrites `logits`, fp32.

    With `group`, the columns are this rank's slice of the vocabulary, from `vocab_start` on.
    """
    num_columns = logits.size(1)
    counted = target != NO_LOSS_LABEL
    local = target - vocab_start
    held = counted & (local >= 0) & (local < num_columns)
    index = torch.where(held, local, 0)[:, None]
    maximum = logits.amax(dim=1) if num_columns else logits.new_full((logits.size(0),), float("-inf"))
    if group is not None:
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    logits.sub_(maximum[:, None])
    if num_columns:
        target_logit = torch.where(held, logits.gather(1, index)[:, 0], 0.0)
    else:
        target_logit = torch.zeros_like(maximum)
    exponentials = logits.exp_()
    denominator = exponentials.sum(dim=1)
    if group is not None:
        both = torch.stack([target_logit, denominator])
        dist.all_reduce(both, group=group)
        target_logit, denominator = both
    losses = torch.where(counted, denominator.log() - target_logit, 0.0)
    if not needs_grad:
        return losses, None
    gradient = exponentials.div_(denominator[:, None]).mul_(counted[:, None])
    if num_columns:
        gradient.scatter_add_(1, index, -held.to(gradient.dtype)[:, None])
    return losses, gradient


class _LinearCrossEntropySum(torch.autograd.Function):
    """sum over tokens of -log softmax(hidden @ weight.T)[label], in fp32, chunk by chunk.

    The gradients are formed in the forward pass, while a chunk's logits exist: d loss / d logits = softmax
    - onehot, so the backward pass only scales them. With `group`, `weight` holds this rank's slice of the
    vocabulary: maximum, sum of exponentials and target logit are reduced over the group, and so is the
    gradient of `hidden`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        vocab_start: int,
        num_valid: int,
        group: Any,
        token_losses: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_grad = hidden.requires_grad or weight.requires_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.float32) if needs_grad and weight.requires_grad else None
        )
        if torch.is_autocast_enabled(hidden.device.type):
            compute_dtype = torch.get_autocast_dtype(hidden.device.type)
        else:
            compute_dtype = weight.dtype
        compute_weight = weight.to(compute_dtype)[:num_valid]
        chunk_size = max(1, MAX_CHUNK_VALUES // max(1, num_valid))
        fused_kernel = (
            liger_kernel() if USE_LIGER_ON in ("any", hidden.device.type) and group is None else None
        )
        for start in range(0, hidden.size(0), chunk_size):
            rows = slice(start, start + chunk_size)
            chunk, target = hidden[rows].to(compute_dtype), labels[rows]
            logits = chunk @ compute_weight.T
            if fused_kernel is not None:
                losses, gradient = _fused_cross_entropy(fused_kernel, logits, target)
            else:
                losses, gradient = _cross_entropy(logits.float(), target, vocab_start, group, needs_grad)
            total += losses.sum()
            if token_losses is not None:
                token_losses[rows] = losses
            if needs_grad:
                gradient = gradient.to(compute_dtype)
                grad_hidden[rows] = gradient @ compute_weight
                if grad_weight is not None:
                    grad_weight[:num_valid].add_(gradient.T @ chunk)
        if needs_grad and group is not None:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad_hidden = (grad_hidden.float() * grad_total).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def next_token_loss_sum(
    lm_head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    tensor_parallel_group: Any = None,
    row_losses: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum of the cross entropy over all labels that are not -100, in fp32.

    Args:
        lm_head: a linear layer without bias; with `tensor_parallel_group`, sharded along the vocabulary
            and possibly padded (colossalai's vocabulary-parallel head).
        hidden: [batch, sequence, width], the same on all ranks of the group.
        labels: [batch, sequence]; `labels[b, t]` is the token that position t has to predict: already
            shifted.
        row_losses: gets the sums of the rows as well, [batch], without gradients.

    Returns:
        A scalar; divide it by the number of labels, over all micro-batches and ranks, to get the mean.
    """
    weight = lm_head.weight
    vocab_start = 0
    if tensor_parallel_group is not None:
        vocab_start = dist.get_rank(tensor_parallel_group) * weight.size(0)
    vocab_size = getattr(lm_head, "old_num_embeddings", None) or weight.size(0)
    num_valid = max(0, min(weight.size(0), vocab_size - vocab_start))
    token_losses = None
    if row_losses is not None:
        token_losses = torch.zeros(labels.numel(), dtype=torch.float32, device=hidden.device)
    loss_sum = _LinearCrossEntropySum.apply(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        vocab_start,
        num_valid,
        tensor_parallel_group,
        token_losses,
    )
    if row_losses is not None:
        row_losses.append(token_losses.view(labels.shape).sum(dim=1))
    return loss_sum


def plain_next_token_loss_sum(
    lm_head: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    row_losses: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The same sum through whole logits, for parameters that must be used by ordinary torch
    operations (Gemini).
    """
    logits = lm_head(hidden).float()
    if row_losses is not None:
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS_LABEL, reduction="none"
        ).view(labels.shape)
        row_losses.append(losses.detach().sum(dim=1))
        return losses.sum()
    return F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LOSS_LABEL, reduction="sum"
    )
