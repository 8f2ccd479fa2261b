"""The ways to make the embedding of a new token from the source's rows of its sub-tokens.

A new way is a function with the arguments of `mean`, and a line in `INITIALIZATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def mean(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """The mean of the rows of each list of ids.

    Args:
        matrix: [source rows, hidden], any float dtype.
        subtokens: for each new row, the source ids of the token's own sub-tokens; never an empty list.

    Returns:
        [len(subtokens), hidden], in fp32; in fp64 where the matrix is.
    """
    import torch

    flat = torch.tensor([token_id for ids in subtokens for token_id in ids])
    lengths = torch.tensor([len(ids) for ids in subtokens])
    # Only the rows in question are turned into fp32: memory stays near that of the result.
    used, position = torch.unique(flat, return_inverse=True)
    rows = matrix[used]
    offsets = torch.cumsum(lengths, 0) - lengths
    return torch.nn.functional.embedding_bag(
        position, rows.to(torch.promote_types(rows.dtype, torch.float32)), offsets, mode="mean"
    )


Initialization = Callable[["torch.Tensor", Sequence[Sequence[int]]], "torch.Tensor"]
INITIALIZATIONS: dict[str, Initialization] = {
    "mean": mean,
}
DEFAULT_INITIALIZATION = "mean"
