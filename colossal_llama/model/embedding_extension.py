"""Which row of an extended embedding matrix holds what, and the rows themselves.

A row is kept (its id means the same in both tokenizers, or it is padding of the source), new (made from the
source rows of the token's own sub-tokens, by one of `INITIALIZATIONS`), or padding (beyond the target's
tokens: the mean of all the source's rows, which no token uses).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.model.initializations import DEFAULT_INITIALIZATION, INITIALIZATIONS
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import cap_problems

if TYPE_CHECKING:
    import torch

MAX_LISTED_CONFLICTS = 5


@dataclass(frozen=True)
class RowPlan:
    """The rows of the target matrices.

    Attributes:
        num_rows: rows of the target, padding included.
        num_source_tokens: source rows that belong to a token; their mean fills padding rows.
        segments: (kind, start, stop), in order and without gaps; kind is "kept", "new" or "padding".
        subtokens: id of a new token -> the source ids that its row is made from.
    """

    num_rows: int
    num_source_tokens: int
    segments: Sequence[tuple[str, int, int]]
    subtokens: Mapping[int, Sequence[int]]

    def count(self, kind: str) -> int:
        return sum(stop - start for name, start, stop in self.segments if name == kind)

    def new_rows(
        self, matrix: torch.Tensor, start: int, stop: int, way: str = DEFAULT_INITIALIZATION
    ) -> torch.Tensor:
        """New rows `start` to `stop`, made from the source's `matrix` [rows, hidden], in fp32.

        Args:
            way: how, a name in `INITIALIZATIONS`.
        """
        return INITIALIZATIONS[way](matrix, [self.subtokens[row] for row in range(start, stop)])

    def new_row_alone(
        self, matrix: torch.Tensor, row: int, way: str = DEFAULT_INITIALIZATION
    ) -> torch.Tensor:
        """One new row by another road, in fp64 and from a matrix of nothing but its sub-tokens' rows."""
        ids = list(self.subtokens[row])
        return INITIALIZATIONS[way](matrix[ids].double(), [range(len(ids))])[0]


def plan_rows(
    source_tokens: Mapping[int, str],
    target_tokens: Mapping[int, str],
    source_rows: int,
    pad_to_multiple_of: int,
    encode: Callable[[Sequence[str]], list[list[int]]],
) -> RowPlan:
    """Decides for every target row where it comes from.

    Args:
        source_tokens, target_tokens: id -> token.
        source_rows: rows of the source's matrices; more than its tokens if they are padded.
        pad_to_multiple_of: the number of target rows is rounded up to a multiple of this.
        encode: tokens -> the source ids of each one's text.

    Raises:
        UserError: an id changes its meaning, or disappears.
    """
    conflicts = [
        f"id {token_id} is {token!r} in the source and "
        + (repr(target_tokens[token_id]) if token_id in target_tokens else "missing")
        + " in the target tokenizer"
        for token_id, token in sorted(source_tokens.items())
        if target_tokens.get(token_id) != token
    ]
    if conflicts:
        remedy = (
            "--target_tokenizer_path: not an extension of the source's tokenizer; make it with "
            "init_tokenizer.py"
        )
        raise UserError([*cap_problems(conflicts, "such ids", MAX_LISTED_CONFLICTS), remedy])

    num_tokens = max(target_tokens) + 1
    num_rows = -(-num_tokens // pad_to_multiple_of) * pad_to_multiple_of
    new_ids = []
    segments: list[tuple[str, int, int]] = []
    for row in range(num_rows):
        if row < source_rows and (row in source_tokens or row not in target_tokens):
            kind = "kept"
        elif row in target_tokens:
            kind = "new"
            new_ids.append(row)
        else:
            kind = "padding"
        if segments and segments[-1][0] == kind:
            segments[-1] = (kind, segments[-1][1], row + 1)
        else:
            segments.append((kind, row, row + 1))

    subtokens = dict(zip(new_ids, encode([target_tokens[row] for row in new_ids]), strict=True))
    for row, ids in subtokens.items():
        if row in source_tokens and ids == [row]:
            raise UserError(
                f"the source's tokenizer has {target_tokens[row]!r} (id {row}), its model has only "
                f"{source_rows:,} rows; --source_model_and_tokenizer_path has to hold the tokenizer that "
                "belongs to the model"
            )
        if not ids or max(ids) >= source_rows:
            raise UserError(
                f"token {target_tokens[row]!r} (id {row}) is no text that the source has embeddings for "
                f"(sub-tokens {ids}, {source_rows:,} rows); rename it in the target tokenizer"
            )
    return RowPlan(num_rows, min(len(source_tokens), source_rows), segments, subtokens)


def mean_of_all_rows(matrix: torch.Tensor, num_rows: int, chunk_rows: int = 4096) -> torch.Tensor:
    """The mean of the first `num_rows` rows of `matrix` [rows, hidden], as fp32 [hidden]."""
    import torch

    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for start in range(0, num_rows, chunk_rows):
        total += matrix[start : min(start + chunk_rows, num_rows)].double().sum(0)
    return (total / num_rows).float()
