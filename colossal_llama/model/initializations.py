"""The ways to make the embedding of a new token from the source's rows of its sub-tokens.

A new way is a function with the arguments of `mean`, and a line in `INITIALIZATIONS`. `measure_init.py`
measures what each is good for.
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
    return _combine(matrix, subtokens, None)


def first(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """The row of the first sub-token: as an output row, the piece is expected where that token is."""
    return _rows(matrix, [ids[0] for ids in subtokens])


def last(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """The row of the last sub-token: as an input row, what the model reads right before it predicts."""
    return _rows(matrix, [ids[-1] for ids in subtokens])


def half(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """Half-way between the first sub-token's row and the mean."""
    return (first(matrix, subtokens) + mean(matrix, subtokens)) / 2


def weighted(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """The mean with weights 1, 2, 4, … from the first sub-token to the last."""
    weights = []
    for ids in subtokens:
        # As powers below 1, so that the weights of many sub-tokens stay finite.
        powers = [2.0 ** (place - len(ids)) for place in range(1, len(ids) + 1)]
        total = sum(powers)
        weights += [power / total for power in powers]
    return _combine(matrix, subtokens, weights)


def rescaled(matrix: torch.Tensor, subtokens: Sequence[Sequence[int]]) -> torch.Tensor:
    """The mean's direction with the mean length of the rows: a mean is shorter than what it is made of."""
    import torch

    rows = mean(matrix, subtokens)
    used, places = torch.unique(
        torch.tensor([token_id for ids in subtokens for token_id in ids]), return_inverse=True
    )
    place = iter(places.tolist())
    # The rows' lengths are a matrix of one column, and averaged as the rows are.
    lengths = _rows(matrix, used.tolist()).norm(dim=1, keepdim=True)
    mean_lengths = mean(lengths, [[next(place) for _ in ids] for ids in subtokens])
    norms = rows.norm(dim=1, keepdim=True)
    return rows * (mean_lengths / norms.clamp_min(torch.finfo(norms.dtype).tiny))


def _rows(matrix: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """Rows in fp32, or in fp64 where the matrix is."""
    import torch

    return matrix[list(ids)].to(torch.promote_types(matrix.dtype, torch.float32))


def _combine(
    matrix: torch.Tensor, subtokens: Sequence[Sequence[int]], weights: Sequence[float] | None
) -> torch.Tensor:
    """The sum of rows with weights, one for each sub-token in order; without weights, their mean."""
    import torch

    flat = torch.tensor([token_id for ids in subtokens for token_id in ids])
    lengths = torch.tensor([len(ids) for ids in subtokens])
    # Only the rows in question are turned into fp32: memory stays near that of the result.
    used, position = torch.unique(flat, return_inverse=True)
    rows = matrix[used]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    offsets = torch.cumsum(lengths, 0) - lengths
    if weights is None:
        return torch.nn.functional.embedding_bag(position, rows, offsets, mode="mean")
    return torch.nn.functional.embedding_bag(
        position, rows, offsets, mode="sum", per_sample_weights=torch.tensor(weights, dtype=rows.dtype)
    )


Initialization = Callable[["torch.Tensor", Sequence[Sequence[int]]], "torch.Tensor"]
INITIALIZATIONS: dict[str, Initialization] = {
    "mean": mean,
    "first": first,
    "last": last,
    "half": half,
    "weighted": weighted,
    "rescaled": rescaled,
}
DEFAULT_INITIALIZATION = "mean"
