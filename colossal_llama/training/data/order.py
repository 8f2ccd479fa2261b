"""The order of rows in an epoch, and how a step's rows are dealt to passes and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from colossal_llama.training.data.rows import RowDataset

# 4 MB of row numbers, or 8: what a core's cache holds.
_ROWS_AT_ONCE = 1 << 20


class RowOrder:
    """The order of all rows in each epoch, fixed by (seed, epoch, buckets) and by nothing else.

    Without `bucketed` the whole data set is shuffled; with it, buckets come in order and each is shuffled
    inside.
    """

    def __init__(self, source: RowDataset, seed: int, bucketed: bool) -> None:
        self.num_rows, self.sets = len(source), source.sets
        self.seed = seed
        self.buckets = source.bucket_ranges if bucketed else [[(0, self.num_rows)]]

    def permutation(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch in training order, [rows]."""
        rows = np.empty(self.num_rows, dtype=np.uint32 if self.num_rows < 2**32 else np.int64)
        filled = 0
        for number, ranges in enumerate(self.buckets):
            size = sum(end - start for start, end in ranges)
            shuffle_ranges(ranges, rows[filled : filled + size], [self.seed, epoch, number])
            filled += size
        return rows

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return self.num_rows

    def set_tokens(self, num_epochs: int) -> list[int]:
        """Tokens of each set in so many epochs."""
        return [each.num_tokens * num_epochs for each in self.sets]

    def steps(self, epoch: int, position: int, rows_per_step: int) -> Iterator[np.ndarray]:
        """The row numbers of each whole step of an epoch from a position on, [rows_per_step]."""
        permutation = self.permutation(epoch)
        while position + rows_per_step <= len(permutation):
            yield permutation[position : position + rows_per_step]
            position += rows_per_step


def shuffle_ranges(ranges: Sequence[tuple[int, int]], out: np.ndarray, seed: Sequence[int]) -> None:
    """Fills `out` with the numbers of all ranges, every order being as likely as any other.

    Swaps all over the memory grow slower with it, so numbers that fill more than a cache are dealt to piles
    at random, and each pile is shuffled by itself (Rao 1961, Sandelius 1962).
    """
    num_piles = max(1, min(256, -(-len(out) // _ROWS_AT_ONCE)))
    sizes = np.zeros(num_piles, dtype=np.int64)
    for _, piles in _deal(ranges, num_piles, np.random.default_rng(seed)):
        sizes += np.bincount(piles, minlength=num_piles)
    filled = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)  # deals the same again: nothing had to be kept
    for numbers, piles in _deal(ranges, num_piles, generator):
        by_pile = numbers[np.argsort(piles, kind="stable")]
        ends = np.cumsum(np.bincount(piles, minlength=num_piles))
        for pile, share in enumerate(np.split(by_pile, ends[:-1])):
            out[filled[pile] : filled[pile] + len(share)] = share
            filled[pile] += len(share)
    for size, end in zip(sizes, filled, strict=True):
        generator.shuffle(out[end - size : end])


def _deal(
    ranges: Sequence[tuple[int, int]], num_piles: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of all ranges and the pile of each, in pieces: they are never in memory twice."""
    for start, end in ranges:
        for first in range(start, end, _ROWS_AT_ONCE):
            numbers = np.arange(first, min(first + _ROWS_AT_ONCE, end))
            yield numbers, generator.integers(num_piles, size=len(numbers), dtype=np.uint8)


@dataclass
class BatchShape:
    """How the rows of an optimizer step are dealt out.

    A step takes `rows_per_step` consecutive rows of the order; pass `a` of data-parallel rank `r` gets rows
    `(a * dp_size + r) * batch_size` and following of them. Every rank of a tensor, pipeline or sequence
    group has the same `dp_rank` and so the same rows.
    """

    batch_size: int
    accumulation_steps: int
    dp_size: int
    dp_rank: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps * self.dp_size


class StepSampler:
    """Yields the row numbers of every micro-batch of this rank, from a position to the end of the last epoch.

    Args:
        position: rows of the first epoch that earlier training has already used.
    """

    def __init__(self, order: RowOrder, plan: BatchShape, epoch: int, position: int, num_epochs: int) -> None:
        self.order, self.plan = order, plan
        self.epoch, self.position, self.num_epochs = epoch, position, num_epochs

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        position = self.position
        for epoch in range(self.epoch, self.num_epochs):
            for step in self.order.steps(epoch, position, plan.rows_per_step):
                for accumulation in range(plan.accumulation_steps):
                    start = (accumulation * plan.dp_size + plan.dp_rank) * plan.batch_size
                    yield [int(row) for row in step[start : start + plan.batch_size]]
            position = 0


class EvaluationSampler:
    """Every row exactly once over all ranks; short batches are filled with None (a row without labels)."""

    def __init__(self, num_rows: int, plan: BatchShape) -> None:
        self.num_rows, self.plan = num_rows, plan

    def __len__(self) -> int:
        return -(-self.num_rows // (self.plan.batch_size * self.plan.dp_size))

    def __iter__(self) -> Iterator[list[int | None]]:
        plan = self.plan
        for batch in range(len(self)):
            start = (batch * plan.dp_size + plan.dp_rank) * plan.batch_size
            rows = range(start, start + plan.batch_size)
            yield [row if row < self.num_rows else None for row in rows]
