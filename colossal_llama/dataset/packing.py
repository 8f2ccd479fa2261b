"""Best-fit packing of documents into rows, on their lengths alone.

Rows of 8 tokens; documents of 5, 4, 3, 2 and 2 tokens (letters), `.` is free:

    in order of arrival      AAAAA...  BBBBCCC.  DDEE....
    best-fit decreasing      AAAAACCC  BBBBDDEE

Pieces are taken from the longest to the shortest; each goes into the row whose free space is the smallest
that still holds it, and opens a row when none does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRows:
    """Which pieces make up each row.

    Row r holds the pieces `pieces[starts[r]:starts[r + 1]]` (indices into the lengths that were packed), in
    ascending order; `lengths[r]` is its number of tokens.
    """

    pieces: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> np.ndarray:
        return self.pieces[self.starts[index] : self.starts[index + 1]]


def pack_best_fit(lengths: np.ndarray, max_length: int) -> PackedRows:
    """Packs pieces into rows of at most `max_length` tokens; every piece is in exactly one row.

    Pieces of one length are placed together. The rows are kept in buckets by free space, with the buckets in
    use as bits of one integer, so the smallest sufficient space is found in one step. A row with free space f
    takes f // length pieces at once (after the first it is still the best fit), and what is left is shorter
    than the piece: for one length every bucket is visited at most once, in ascending order. Together: at most
    one step for each piece, and at most one for each pair of a length and a bucket.

    Args:
        lengths: int array [num_pieces], each in 1..max_length.
        max_length: capacity of a row, in tokens.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert lengths.size == 0 or (lengths.min() >= 1 and lengths.max() <= max_length)
    order = np.argsort(-lengths, kind="stable")
    distinct, first = np.unique(-lengths[order], return_index=True)
    boundaries = np.append(first, len(order)).tolist()

    row_of_rank = np.empty(len(order), dtype=np.int64)
    buckets: dict[int, list[int]] = {}
    in_use = 0  # bit f is set when some row has f free tokens
    num_rows = 0
    for group, length in enumerate((-distinct).tolist()):
        rank, end = boundaries[group], boundaries[group + 1]
        smallest = length
        while rank < end and (candidates := in_use >> smallest):
            free = smallest + (candidates & -candidates).bit_length() - 1
            smallest = free + 1
            fitting, rest = divmod(free, length)
            rows = buckets[free]
            num_filled = min(len(rows), (end - rank) // fitting)
            filled = rows[len(rows) - num_filled :]
            del rows[len(rows) - num_filled :]
            if filled:
                taken = num_filled * fitting
                row_of_rank[rank : rank + taken] = np.repeat(filled, fitting) if fitting > 1 else filled
                rank += taken
                in_use = _put(buckets, in_use, rest, filled)
            if rows and rank < end:  # fewer pieces are left than the next row could take
                row = rows.pop()
                row_of_rank[rank:end] = row
                in_use = _put(buckets, in_use, free - (end - rank) * length, [row])
                rank = end
            if not rows:
                del buckets[free]
                in_use &= ~(1 << free)
        if rank < end:
            fitting, rest = divmod(max_length, length)
            num_new = -(-(end - rank) // fitting)
            new_rows = np.arange(num_rows, num_rows + num_new)
            row_of_rank[rank:end] = np.repeat(new_rows, fitting)[: end - rank]
            num_in_last = (end - rank) - (num_new - 1) * fitting
            in_use = _put(buckets, in_use, rest, new_rows[:-1].tolist())
            in_use = _put(buckets, in_use, max_length - num_in_last * length, [num_rows + num_new - 1])
            num_rows += num_new

    row_of_piece = np.empty(len(order), dtype=np.int64)
    row_of_piece[order] = row_of_rank
    return _rows_from_assignment(row_of_piece, lengths, num_rows)


def one_piece_per_row(lengths: np.ndarray) -> PackedRows:
    """Every piece is a row of its own."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return PackedRows(np.arange(len(lengths)), np.arange(len(lengths) + 1), lengths)


def shuffle_rows(rows: PackedRows, seed: int, bin_index: int) -> PackedRows:
    """Rows in an order drawn from (seed, bin), the emptiest row last.

    Best-fit leaves rows of similar documents beside each other, and one part-filled row; training should see
    neither pattern. `RandomState` is used because numpy promises its streams never to change.
    """
    if len(rows) == 0:
        return rows
    last = int(np.argmin(rows.lengths))
    others = np.delete(np.arange(len(rows)), last)
    order = np.append(np.random.RandomState([seed, bin_index, 1]).permutation(others), last)
    sizes = np.diff(rows.starts)[order]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = rows.pieces[np.repeat(rows.starts[:-1][order], sizes) + within]
    return PackedRows(pieces, starts, rows.lengths[order])


def _put(buckets: dict[int, list[int]], in_use: int, free: int, rows: list[int]) -> int:
    """Adds rows with `free` tokens of space to their bucket; full rows are done. Returns the new `in_use`."""
    if not rows or free == 0:
        return in_use
    buckets.setdefault(free, []).extend(rows)
    return in_use | (1 << free)


def _rows_from_assignment(row_of_piece: np.ndarray, lengths: np.ndarray, num_rows: int) -> PackedRows:
    pieces = np.argsort(row_of_piece, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(row_of_piece, minlength=num_rows))))
    row_lengths = np.bincount(row_of_piece, weights=lengths, minlength=num_rows).astype(np.int64)
    return PackedRows(pieces, starts, row_lengths)
