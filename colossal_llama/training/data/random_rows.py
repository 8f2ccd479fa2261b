"""Random rows for `--benchmark`: full length, one document each, loss on every token."""

from __future__ import annotations

import numpy as np

from colossal_llama.training.data.rows import Row
from colossal_llama.training.data.sets import RowSet


class RandomRows:
    """`num_rows` rows of `length` tokens, the same for the same seed, made when they are read."""

    def __init__(self, num_rows: int, length: int, vocab_size: int, seed: int) -> None:
        self.num_rows, self.length, self.vocab_size, self.seed = num_rows, length, vocab_size, seed
        self.bucket_ranges = [[(0, num_rows)]]
        self.sets: list[RowSet] = []
        self.num_tokens = num_rows * length
        self.fingerprint = f"random-{num_rows}-{length}-{vocab_size}-{seed}"

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        tokens = np.random.default_rng([self.seed, index]).integers(0, self.vocab_size, self.length)
        return Row(tokens, tokens, np.array([self.length]))

    def describe_row(self, index: int) -> str:
        return f"random row {index}"

    def row_lengths(self) -> np.ndarray:
        return np.full(self.num_rows, self.length)

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows), dtype=np.int64)
