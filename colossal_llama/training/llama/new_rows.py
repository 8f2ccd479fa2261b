"""Only the rows of new pieces train: what `--freeze_non_embeds_params new_rows` does to the embeddings.

Gradients of all other rows are zero before anything reduces, measures or clips them. So Adam's moments of
these rows stay zero, and its steps leave them as they are, bit for bit. Weight decay would not: the optimizer
has none for these matrices, and the new rows get theirs here.

    one embedding matrix, tensor parallel rank 1 of 2, ZeRO rank 0 of 2:

    rows of the vocabulary   0 1 2 3 | 4 5 6 7      6 and 7 are new
    rows of the part                   4 5 6 7      local rows 2 and 3
    values of the slice                4 5          none of them
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from colossal_llama.training.llama.adapters import is_embedding


def local_rows(new_ids: range, num_rows: int, tensor_rank: int) -> slice:
    """The new rows among the `num_rows` rows of tensor parallel rank `tensor_rank`."""
    first = tensor_rank * num_rows
    start, stop = (min(max(bound - first, 0), num_rows) for bound in (new_ids.start, new_ids.stop))
    return slice(start, stop)


def local_values(
    new_ids: range, shape: Sequence[int], tensor_rank: int, offset: int, num_values: int
) -> slice:
    """The values of new rows in a piece of a flattened part of an embedding matrix.

    Args:
        shape: of the part.
        offset: of the piece in the flattened part.
    """
    rows = local_rows(new_ids, shape[0], tensor_rank)
    start, stop = (min(max(row * shape[1] - offset, 0), num_values) for row in (rows.start, rows.stop))
    return slice(start, stop)


def mask_gradients(model: nn.Module, new_ids: range, tensor_rank: int) -> None:
    """Makes the gradients of the embeddings zero in all rows but the new ones, from now on.

    Has to be called before a plugin takes the model over: hooks run in the order in which they were added,
    and Gemini's own takes the gradient away.

    Args:
        tensor_rank: of the part of the vocabulary that this process will hold.
    """

    def mask(gradient: torch.Tensor) -> torch.Tensor:
        # The parameter may be split and padded by now: the gradient has the size that counts. It is fresh
        # from the backward pass, so nothing else reads it; a copy would be as large as the matrix.
        rows = local_rows(new_ids, gradient.size(0), tensor_rank)
        with torch.no_grad():
            gradient[: rows.start] = 0
            gradient[rows.stop :] = 0
        return gradient

    for name, parameter in model.named_parameters():
        if is_embedding(name) and parameter.requires_grad:
            parameter.register_hook(mask)


@dataclass(frozen=True)
class NewRowValues:
    """Values of new rows that this process updates, among those that the optimizer updates together.

    Attributes:
        master: what the optimizer updates; its gradient is None in a step that leaves it out.
        values: those of new rows in the flattened `master`.
    """

    master: torch.Tensor
    values: slice


def decay_before_steps(
    optimizer: torch.optim.Optimizer, rows: Iterable[NewRowValues], weight_decay: float
) -> None:
    """Adds decoupled weight decay of the new rows to the steps of `optimizer`, where AdamW has it.

    Args:
        optimizer: torch's own, inside colossalai's: its `step` is not called when fp16 overflowed.
    """
    ranges = {row.master: row.values for row in rows if row.values.start < row.values.stop}

    @torch.no_grad()
    def decay(optimizer: Any, args: Any, kwargs: Any) -> None:
        # torch's own scaler calls `step` in any case, and lets the kernel skip it.
        found_overflow = getattr(optimizer, "found_inf", None)
        if found_overflow is not None and found_overflow.item():
            return
        for group in optimizer.param_groups:
            for master in group["params"]:
                if master in ranges and master.grad is not None:
                    master.view(-1)[ranges[master]].mul_(1 - group["lr"] * weight_decay)

    if ranges and weight_decay:
        optimizer.register_step_pre_hook(decay)
