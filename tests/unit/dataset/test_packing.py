"""Packing: nothing lost, rows never too long, as good as best-fit decreasing, and close to the optimum."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.dataset.packing import PackedRows, one_piece_per_row, pack_best_fit, shuffle_rows


@st.composite
def packing_problems(draw: st.DrawFn, max_pieces: int = 60) -> tuple[list[int], int]:
    max_length = draw(st.integers(2, 64))
    lengths = draw(st.lists(st.integers(1, max_length), max_size=max_pieces))
    return lengths, max_length


def rows_as_lists(rows: PackedRows) -> list[list[int]]:
    return [rows.row(index).tolist() for index in range(len(rows))]


def best_fit_decreasing(lengths: list[int], max_length: int) -> list[int]:
    """The textbook algorithm, a piece at a time; returns the free space of every row, sorted."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in free if space >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(max_length - length)
    return sorted(free)


def fewest_rows(lengths: list[int], max_length: int) -> int:
    """The optimum, by trying everything."""

    @cache
    def search(remaining: tuple[int, ...], free: tuple[int, ...]) -> int:
        if not remaining:
            return len(free)
        length, rest = remaining[0], remaining[1:]
        best = search(rest, tuple(sorted((*free, max_length - length))))
        for index, space in enumerate(free):
            if space >= length and space not in free[:index]:
                filled = tuple(sorted((*free[:index], space - length, *free[index + 1 :])))
                best = min(best, search(rest, filled))
        return best

    return search(tuple(sorted(lengths, reverse=True)), ())


def test_the_docstrings_example() -> None:
    lengths = np.array([5, 4, 3, 2, 2])
    rows = pack_best_fit(lengths, 8)
    assert sorted(rows_as_lists(rows)) == [[0, 2], [1, 3, 4]]
    assert rows.lengths.tolist() == [8, 8]


@settings(deadline=None)
@given(packing_problems())
def test_every_piece_is_in_one_row_and_rows_are_never_too_long(problem: tuple[list[int], int]) -> None:
    lengths, max_length = problem
    rows = pack_best_fit(np.array(lengths, dtype=np.int32), max_length)
    assert sorted(rows.pieces.tolist()) == list(range(len(lengths)))
    for row, total in zip(rows_as_lists(rows), rows.lengths.tolist(), strict=True):
        assert row == sorted(row)
        assert row
        assert sum(lengths[piece] for piece in row) == total <= max_length


@settings(deadline=None)
@given(packing_problems())
def test_rows_are_those_of_best_fit_decreasing(problem: tuple[list[int], int]) -> None:
    lengths, max_length = problem
    rows = pack_best_fit(np.array(lengths, dtype=np.int32), max_length)
    assert sorted((max_length - rows.lengths).tolist()) == best_fit_decreasing(lengths, max_length)


@settings(deadline=None, max_examples=60)
@given(packing_problems(max_pieces=8))
def test_against_brute_force(problem: tuple[list[int], int]) -> None:
    lengths, max_length = problem
    optimum = fewest_rows(lengths, max_length)
    # The proven bound of best-fit decreasing (Dósa 2007): 11/9 of the optimum and 6/9 of a row.
    assert (
        optimum <= len(pack_best_fit(np.array(lengths, dtype=np.int32), max_length)) <= (11 * optimum + 6) / 9
    )


@pytest.mark.parametrize("max_length", [4096, 2047, 513])
def test_rows_of_ordinary_documents_are_full(max_length: int) -> None:
    lengths = np.random.RandomState(0).lognormal(5, 1.2, 30000).astype(np.int64).clip(2, max_length)
    rows = pack_best_fit(lengths, max_length)
    rows = shuffle_rows(rows, seed=1, bin_index=0)
    assert rows.lengths[:-1].mean() / max_length >= 0.995


def test_one_piece_per_row() -> None:
    rows = one_piece_per_row(np.array([3, 1, 2]))
    assert rows_as_lists(rows) == [[0], [1], [2]]
    assert rows.lengths.tolist() == [3, 1, 2]


@settings(deadline=None)
@given(packing_problems(), st.integers(0, 1000))
def test_shuffling_keeps_the_rows_and_puts_the_emptiest_last(
    problem: tuple[list[int], int], seed: int
) -> None:
    lengths, max_length = problem
    rows = pack_best_fit(np.array(lengths, dtype=np.int32), max_length)
    shuffled = shuffle_rows(rows, seed, bin_index=3)
    assert sorted(rows_as_lists(shuffled)) == sorted(rows_as_lists(rows))
    assert [sum(lengths[p] for p in row) for row in rows_as_lists(shuffled)] == shuffled.lengths.tolist()
    if lengths:
        assert shuffled.lengths[-1] == rows.lengths.min()
    again = shuffle_rows(rows, seed, bin_index=3)
    assert again.pieces.tolist() == shuffled.pieces.tolist()


def test_shuffling_depends_on_seed_and_bin() -> None:
    rows = pack_best_fit(np.full(200, 8), 8)
    orders = {tuple(shuffle_rows(rows, seed, bin_index).pieces) for seed in (1, 2) for bin_index in (0, 1)}
    assert len(orders) == 4
