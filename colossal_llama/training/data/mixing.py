"""The order of rows where sets are mixed in given shares of the tokens.

    weights  3 1
    set 0    a4 a0 a2 a1 a3 | a2 a3 ...           every row once an epoch
    set 1    b1 b0 | b0 b1 | ...                  a shuffled cycle, which an epoch's end does not break
    order    a4 b1 a0 a2 a1 b0 a3 | a2 ...        the next row is the set's whose tokens lag most

A set's lag is its share of all tokens so far less its own tokens so far. Choosing the largest one after each
row keeps every set within about a row of its share at any time, whatever the lengths of the rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.training.data.order import RowOrder, shuffle_ranges
from colossal_llama.training.data.sets import RowSet
from colossal_llama.utils.messages import join_names

if TYPE_CHECKING:
    from colossal_llama.training.data.rows import RowDataset
    from colossal_llama.training.settings import DataSettings

# Rows that are dealt at once, at most: what bounds the memory beside that of the rows' own numbers.
_ROWS_AT_ONCE = 1 << 20
# Stretches of an order that are computed side by side, and the rows by which each begins early.
_WINDOWS = 1024
_ROWS_OF_WINDOW = 512
_ROWS_BEFORE = 64
# Weights are whole numbers with at most this sum, so that lags are exact in 64 bits.
_LARGEST_SUM = 1 << 30


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the same proportions as the decimal numbers that were given: 0.75 0.25 -> 3 1.

    Where these would be very large, the nearest proportions in steps of a billionth.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    largest = max(exact)
    unit = Fraction(1, np.lcm.reduce([1, *(f.denominator for f in exact)], dtype=object))
    whole = [int(f / unit) for f in exact]
    divisor = np.gcd.reduce(whole, dtype=object)
    whole = [int(w // divisor) for w in whole]
    if sum(whole) <= _LARGEST_SUM:
        return whole
    scale = Fraction(_LARGEST_SUM // (2 * len(exact))) / largest
    return [max(1, round(f * scale)) for f in exact]


@dataclass(frozen=True)
class MixState:
    """A place in the order of a whole run.

    Attributes:
        counts, tokens: of each set, dealt before it.
    """

    counts: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def position(self) -> int:
        return sum(self.counts)


class MixedOrder:
    """The order of all rows that sets are mixed to, fixed by (seed, epoch, weights, rows) and nothing else.

    It is one stream for a whole run: an epoch ends before the first row of the first set's next pass. It is
    computed where it is needed, a stretch at a time: what stays in memory is the length of each row and the
    order of each set's rows in the pass that it is in.

    Args:
        row_lengths: tokens of each row of the data set.
        bucketed: every set's rows come in the order of its bins, shuffled inside each.
        weights: one for each set; their proportions are the sets' shares.
    """

    def __init__(
        self,
        sets: Sequence[RowSet],
        row_lengths: np.ndarray,
        seed: int,
        bucketed: bool,
        weights: Sequence[float],
    ) -> None:
        self.sets, self.seed, self.bucketed = list(sets), seed, bucketed
        self._lengths = row_lengths
        self._weights = whole_weights(weights)
        self._starts = [MixState((0,) * len(self.sets), (0,) * len(self.sets))]

    def start_of(self, epoch: int) -> MixState:
        """Where an epoch begins, which is where the one before ends."""
        while epoch >= len(self._starts):
            self._starts.append(self._find_end(len(self._starts)))
        return self._starts[epoch]

    def epoch_rows(self, epoch: int) -> int:
        """How many rows an epoch has."""
        return self.start_of(epoch + 1).position - self.start_of(epoch).position

    def set_tokens(self, num_epochs: int) -> list[int]:
        """Tokens of each set in so many epochs."""
        return list(self.start_of(num_epochs).tokens)

    def steps(self, epoch: int, position: int, rows_per_step: int) -> Iterator[np.ndarray]:
        """The row numbers of each whole step of an epoch from a position on, [rows_per_step]."""
        rows_left = self.epoch_rows(epoch) - position
        rows = np.zeros(0, dtype=np.int64)
        for stretch in self._stretches(self.start_of(epoch)):
            found = stretch.row_numbers()
            skipped = min(position, len(found))
            position -= skipped
            rows = np.concatenate([rows, found[skipped:]])
            for start in range(0, len(rows) - rows_per_step + 1, rows_per_step):
                if rows_left < rows_per_step:
                    return
                yield rows[start : start + rows_per_step]
                rows_left -= rows_per_step
            if rows_left < rows_per_step:
                return
            rows = rows[len(rows) - len(rows) % rows_per_step :]

    def permutation(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch in training order, [rows]; all of them in memory."""
        return next(self.steps(epoch, 0, self.epoch_rows(epoch)))

    def _find_end(self, num_epochs: int) -> MixState:
        """Where so many epochs end: before the first set's row that begins its next pass."""
        missing = num_epochs * self.sets[0].num_rows
        for stretch in self._stretches(self._starts[-1]):
            firsts = np.flatnonzero(stretch.choices == 0)
            index = missing - stretch.start.counts[0]
            if index < len(firsts):
                return stretch.state_at(int(firsts[index]))
        raise AssertionError("the order has no end")

    def _stretches(self, start: MixState) -> Iterator[_Stretch]:
        """The order from a place on, without an end."""
        queues = [
            _Queue(_Cycle(each, [self.seed, number], self.bucketed, start.counts[number]), self._lengths)
            for number, each in enumerate(self.sets)
        ]
        total = sum(self._weights)
        # Tokens to an unit of weight that a stretch is to have: a whole epoch, or what fits.
        mean_lengths = [max(1.0, each.num_tokens / each.num_rows) for each in self.sets]
        rows_per_unit = sum(w / mean for w, mean in zip(self._weights, mean_lengths, strict=True))
        epoch_units = max(1.0, self.sets[0].num_tokens) / self._weights[0]
        units = min(epoch_units, _ROWS_AT_ONCE / rows_per_unit, 2**60 / total / total)
        while True:
            for queue, weight, mean in zip(queues, self._weights, mean_lengths, strict=True):
                queue.fill(int(units * weight / mean) + 2 * _ROWS_BEFORE + 8)
            lags = [
                weight * sum(start.tokens) - total * own
                for weight, own in zip(self._weights, start.tokens, strict=True)
            ]
            choices = deal([queue.lengths for queue in queues], self._weights, lags)
            stretch = _Stretch(
                start, choices, [queue.rows for queue in queues], [queue.lengths for queue in queues]
            )
            yield stretch
            after = stretch.state_at(len(choices))
            for queue, used in zip(queues, np.subtract(after.counts, start.counts).tolist(), strict=True):
                queue.drop(used)
            start = after


@dataclass(frozen=True)
class _Stretch:
    """Rows of the order behind one another.

    Attributes:
        start: the place of the first one.
        choices: number of the set that each row is from, [rows].
        rows, lengths: of each set, the rows that come next, and their tokens.
    """

    start: MixState
    choices: np.ndarray
    rows: list[np.ndarray]
    lengths: list[np.ndarray]

    def row_numbers(self) -> np.ndarray:
        numbers = np.empty(len(self.choices), dtype=np.int64)
        for number, rows in enumerate(self.rows):
            chosen = self.choices == number
            numbers[chosen] = rows[: np.count_nonzero(chosen)]
        return numbers

    def state_at(self, end: int) -> MixState:
        """The place behind the first `end` rows."""
        counts = np.bincount(self.choices[:end], minlength=len(self.rows)).tolist()
        sums = [int(lengths[:count].sum()) for lengths, count in zip(self.lengths, counts, strict=True)]
        return MixState(
            tuple(a + b for a, b in zip(self.start.counts, counts, strict=True)),
            tuple(a + b for a, b in zip(self.start.tokens, sums, strict=True)),
        )


def make_order(source: RowDataset, seed: int, data: DataSettings) -> RowOrder | MixedOrder:
    """The order that `--dataset_weights` and `--bucketed` ask for."""
    if data.dataset_weights is None or not source.sets:
        return RowOrder(source, seed, data.bucketed)
    return MixedOrder(source.sets, source.row_lengths(), seed, data.bucketed, data.dataset_weights)


def find_weight_problems(sets: Sequence[RowSet], weights: Sequence[float] | None) -> list[str]:
    """What keeps the sets from being mixed, before anything else is known of the run."""
    if weights is None:
        return []
    given = "--dataset_weights " + " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != len(sets):
        names = join_names([each.name for each in sets], most=20)
        return [
            f"{given}: one weight for each set is needed, and --dataset names {len(sets)} ({names}); give "
            f"{len(sets)} weights, in this order"
        ]
    return [f"{given}: set {each.name} has no rows; leave it out" for each in sets if not each.num_rows]


def find_repeat_problems(
    sets: Sequence[RowSet], weights: Sequence[float], num_epochs: int, max_repeats: int
) -> list[str]:
    """Sets whose share asks for more passes than `--max_repeats`; the first one has an epoch each."""
    problems, first = [], sets[0]
    for each, weight in list(zip(sets, weights, strict=True))[1:]:
        run_tokens = first.num_tokens * num_epochs * weight / weights[0]
        passes = run_tokens / max(1, each.num_tokens)
        if passes <= max_repeats * (1 + 1e-9):
            continue
        most = max_repeats * each.num_tokens * weights[0] / (first.num_tokens * num_epochs)
        problems.append(
            f"--dataset_weights: set {each.name} would be passed over {passes:.4g} times in the run (its "
            f"share is {weight / sum(weights):.3%} of the tokens, about {run_tokens:,.0f}; it has "
            f"{each.num_tokens:,}), more than --max_repeats {max_repeats}; give it a weight of at most "
            f"{_rounded_down(most)}, or more data, or raise --max_repeats"
        )
    return problems


def _rounded_down(value: float) -> str:
    """Three digits, so that no more is named than is allowed."""
    if value <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return f"{math.floor(value / unit) * unit:.3g}"


class _Cycle:
    """The rows of a set, shuffled anew in each pass, from a count of rows on."""

    def __init__(self, rows: RowSet, seed: Sequence[int], bucketed: bool, start: int) -> None:
        self.size, self.next = rows.num_rows, start
        self._bins = rows.bins if bucketed else [[piece for ranges in rows.bins for piece in ranges]]
        self._seed = seed
        last = max(end for ranges in rows.bins for _, end in ranges)
        self._rows = np.empty(self.size, dtype=np.uint32 if last <= 2**32 else np.int64)
        self._pass = -1

    def take(self, count: int) -> np.ndarray:
        taken = np.empty(count, dtype=self._rows.dtype)
        filled = 0
        while filled < count:
            number, offset = divmod(self.next, self.size)
            if number != self._pass:
                self._shuffle(number)
            piece = self._rows[offset : offset + count - filled]
            taken[filled : filled + len(piece)] = piece
            filled, self.next = filled + len(piece), self.next + len(piece)
        return taken

    def _shuffle(self, number: int) -> None:
        seed, set_number = self._seed
        filled = 0
        for bin_number, ranges in enumerate(self._bins):
            size = sum(end - start for start, end in ranges)
            shuffle_ranges(ranges, self._rows[filled : filled + size], [seed, number, bin_number, set_number])
            filled += size
        self._pass = number


class _Queue:
    """The next rows of a set and their tokens: a row without any counts as one, so that it has its turn."""

    def __init__(self, cycle: _Cycle, all_lengths: np.ndarray) -> None:
        self._cycle, self._all_lengths = cycle, all_lengths
        self.rows = cycle.take(0)
        self.lengths = np.zeros(0, dtype=np.int64)

    def fill(self, size: int) -> None:
        missing = size - len(self.rows)
        if missing > 0:
            taken = self._cycle.take(missing)
            self.rows = np.concatenate([self.rows, taken])
            lengths = np.maximum(self._all_lengths[taken], 1).astype(np.int64)
            self.lengths = np.concatenate([self.lengths, lengths])

    def drop(self, count: int) -> None:
        self.rows, self.lengths = self.rows[count:], self.lengths[count:]


def deal(lengths: Sequence[np.ndarray], weights: Sequence[int], lags: Sequence[int]) -> np.ndarray:
    """From which set each of the next rows is: always from the one whose tokens lag most behind its share.

    Args:
        lengths: tokens of the next rows of each set.
        weights: whole numbers, in the proportions of the shares.
        lags: of each set so far: its weight times all tokens, less the sum of weights times its own.

    Returns:
        Numbers of sets, [rows], until the next row would be from a set that has none left. (Somewhat fewer
        where many rows are dealt at once.)
    """
    state = _Lags(lengths, weights, lags)
    tokens = state.tokens_for_all(spare=2 * _ROWS_BEFORE)
    if tokens > 0:
        num_windows = min(_WINDOWS, int(state.find([tokens]).sum()) // _ROWS_OF_WINDOW)
        if num_windows > 1 and len(choices := _deal_in_windows(state, tokens, num_windows)):
            return choices
    return np.array(list(state.deal_singly([0] * len(lengths))), dtype=state.dtype)


class _Lags:
    """What decides from which set the next row is, as a function of how many rows each set has dealt."""

    def __init__(self, lengths: Sequence[np.ndarray], weights: Sequence[int], lags: Sequence[int]) -> None:
        self.weights, self.total = np.array(weights, dtype=np.int64), sum(weights)
        self.lags = np.array(lags, dtype=np.int64)
        self.lengths = lengths
        # Tokens of the first n rows of each set.
        self.sums = [np.concatenate([[0], np.cumsum(each)]) for each in lengths]
        self.dtype = np.uint8 if len(weights) <= 256 else np.uint16

    def tokens_for_all(self, spare: int) -> int:
        """Tokens of the most rows that can be dealt so that every set has some to spare."""
        return min(
            (int(sums[-1 - spare]) * self.total + int(-lag)) // int(weight) if len(sums) > spare else 0
            for sums, weight, lag in zip(self.sums, self.weights, self.lags, strict=True)
        )

    def find(self, tokens: Sequence[int]) -> np.ndarray:
        """Rows of each set among the first so many tokens if no set lagged, [sets, len(tokens)]."""
        targets = (
            self.weights[:, None] * np.array(tokens, dtype=np.int64) + self.lags[:, None]
        ) // self.total
        return np.stack([np.searchsorted(s, target) for s, target in zip(self.sums, targets, strict=True)])

    @functools.cached_property
    def length_lists(self) -> list[list[int]]:
        return [each.tolist() for each in self.lengths]

    def deal_singly(self, counts: Sequence[int]) -> Iterator[int]:
        """Which set each row is from, behind the first `counts` rows of the sets."""
        counts, numbers = list(counts), range(len(counts))
        weights, total = self.weights.tolist(), self.total
        all_lengths = self.length_lists
        own = [int(sums[count]) for sums, count in zip(self.sums, counts, strict=True)]
        tokens = sum(own)
        lags = [
            lag + weight * tokens - total * held
            for lag, weight, held in zip(self.lags.tolist(), weights, own, strict=True)
        ]
        while True:
            chosen = lags.index(max(lags))
            if counts[chosen] == len(all_lengths[chosen]):
                return
            yield chosen
            length = all_lengths[chosen][counts[chosen]]
            counts[chosen] += 1
            for number in numbers:
                lags[number] += weights[number] * length
            lags[chosen] -= total * length


def _deal_in_windows(state: _Lags, tokens: int, num_windows: int) -> np.ndarray:
    """`_Lags.deal_singly` for many stretches of the order at once.

    Each but the first starts from a guess: as many rows of each set as if none lagged. What was right before
    then decides within a few rows what is right, so the stretch before is continued for some rows into the
    next; where both have then dealt the same rows, all later ones are the same too. Where they have not, the
    one before is continued until they have.

        window 0   ──────────────────────┤
        window 1             guess ┄┄┄┄┄┄├──────────────────────┤
        window 2                                   guess ┄┄┄┄┄┄┄├─────────
    """
    tokens_before = [tokens * window // num_windows for window in range(num_windows + 1)]
    starts = state.find(tokens_before)
    starts[:, 0] = 0
    ends = np.diff(starts.sum(axis=0)) + _ROWS_BEFORE  # rows that each window deals
    offsets = np.cumsum([0, *(len(sums) for sums in state.sums)])
    flat, offsets, last = np.concatenate(state.sums), offsets[:-1, None], offsets[1:, None] - 1
    choices = np.zeros((int(ends.max()), num_windows), dtype=state.dtype)
    weights, lags, windows = state.weights[:, None], state.lags[:, None], np.arange(num_windows)
    places = starts[:, :-1] + offsets
    after_guess, after_end = np.zeros_like(places), np.zeros_like(places)
    for row in range(len(choices) + 1):
        if row == _ROWS_BEFORE:
            after_guess = places - offsets
        if (ended := ends == row).any():
            after_end[:, ended] = (places - offsets)[:, ended]
        if row < len(choices):
            own = flat[places]
            chosen = (weights * own.sum(axis=0) - state.total * own + lags).argmax(axis=0)
            choices[row] = chosen
            places[chosen, windows] += 1
            np.minimum(places, last, out=places)  # windows that have ended run on
    sizes = np.array([len(each) for each in state.lengths])
    num_right = 0
    for window in range(num_windows):
        if window and (right := after_end[:, window - 1] - after_guess[:, window]).any():
            rows = slice(_ROWS_BEFORE, int(ends[window]))
            difference = _correct(state, after_guess[:, window], right, choices[rows, window])
            if difference is None:
                break
            after_end[:, window] += difference
        if (after_end[:, window] >= sizes).any():
            break  # a set may have had no rows left
        num_right += 1
    row = np.arange(len(choices))
    is_right = row < ends[:num_right, None]
    is_right[1:] &= row >= _ROWS_BEFORE
    return choices.T[:num_right][is_right]


def _correct(
    state: _Lags, guessed: np.ndarray, difference: np.ndarray, choices: np.ndarray
) -> np.ndarray | None:
    """Corrects what was dealt behind a wrong guess, until it would have come out the same.

    Args:
        guessed: how many rows each set had dealt before.
        difference: what has to be added to them.
        choices: what was dealt behind the guess; corrected in place.

    Returns:
        What has to be added to the rows of each set behind all of these; None when a set had none left.
    """
    singly = state.deal_singly((guessed + difference).tolist())
    difference = difference.copy()
    for row in range(len(choices)):
        chosen = next(singly, None)
        if chosen is None:
            return None
        difference[chosen] += 1
        difference[choices[row]] -= 1
        choices[row] = chosen
        if not difference.any():
            break
    return difference
