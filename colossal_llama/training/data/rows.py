"""A row of a bin, and what training reads rows from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from colossal_llama.training.data.sets import RowSet


@dataclass
class Row:
    """One row of a bin: `input_ids` and `labels` [tokens], `document_lengths` [documents], summing to
    the tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_lengths: np.ndarray


class RowDataset(Protocol):
    """What training reads rows from: a prepared data set, or random rows for a benchmark.

    Attributes:
        sets: that it is made of; of no more than one, it may not know.
    """

    bucket_ranges: list[list[tuple[int, int]]]
    sets: list[RowSet]
    num_tokens: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def describe_row(self, index: int) -> str: ...

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, [rows]."""
        ...

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the set that each row belongs to, [rows]."""
        ...


def find_row_problem(
    source: RowDataset, index: int, row: Row, vocab_size: int, need_documents: bool
) -> str | None:
    """What keeps a row from being trained on, or None."""
    outside = row.input_ids[(row.input_ids < 0) | (row.input_ids >= vocab_size)]
    if len(outside):
        return (
            f"{source.describe_row(index)}: holds token {int(outside[0])}, but the model has {vocab_size} "
            "embeddings; it was prepared with another tokenizer"
        )
    num_tokens, total = len(row.input_ids), int(row.document_lengths.sum())
    if need_documents and num_tokens and total != num_tokens:
        return (
            f"{source.describe_row(index)}: document_lengths sum to {total}, the row has {num_tokens} "
            "tokens; prepare the data again"
        )
    return None
