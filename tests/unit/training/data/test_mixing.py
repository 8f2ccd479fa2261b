"""The order of mixed sets against a version that compares all lags after each row."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.data import mixing
from colossal_llama.training.data import order as order_module
from colossal_llama.training.data.mixing import (
    MixedOrder,
    deal,
    find_repeat_problems,
    find_weight_problems,
    whole_weights,
)
from colossal_llama.training.data.order import BatchShape, StepSampler
from colossal_llama.training.data.sets import RowSet


def make_sets(sizes: Sequence[int], lengths: Sequence[int], num_bins: int = 1) -> list[RowSet]:
    """Sets behind one another, each cut into bins."""
    sets, first = [], 0
    for number, size in enumerate(sizes):
        edges = [first + size * edge // num_bins for edge in range(num_bins + 1)]
        bins = [[pair] for pair in itertools.pairwise(edges)]
        sets.append(RowSet(f"set-{number}", size, int(sum(lengths[first : first + size])), bins))
        first += size
    return sets


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[int], list[int], list[float]]:
    """Rows of each set, tokens of each row, weights."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    lengths = draw(st.lists(st.integers(1, 50), min_size=sum(sizes), max_size=sum(sizes)))
    weight = st.one_of(st.integers(1, 5).map(float), st.floats(0.05, 20).map(lambda value: round(value, 3)))
    return sizes, lengths, draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))


def mix(mixture: tuple[list[int], list[int], list[float]], **options: int) -> MixedOrder:
    sizes, lengths, weights = mixture
    sets = make_sets(sizes, lengths, options.get("num_bins", 1))
    return MixedOrder(
        sets,
        np.array(lengths, dtype=np.uint16),
        options.get("seed", 1),
        "num_bins" in options,
        weights,
    )


def rows_of(order: MixedOrder, num_epochs: int) -> list[int]:
    return [row for epoch in range(num_epochs) for row in order.permutation(epoch).tolist()]


def sets_of(rows: list[int], sizes: list[int]) -> list[int]:
    return np.searchsorted(np.cumsum(sizes), rows, side="right").tolist()


def choose_singly(
    lengths: list[Iterator[int]], weights: list[float], shares: list[Fraction] | None = None
) -> Iterator[int]:
    """The set of each next row: the one whose tokens lag most behind its share."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = shares or [weight / sum(exact) for weight in exact]
    own = [0] * len(weights)
    while True:
        lags = [share * sum(own) - tokens for share, tokens in zip(shares, own, strict=True)]
        chosen = lags.index(max(lags))
        yield chosen
        own[chosen] += next(lengths[chosen])


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(1, 3))
def test_the_next_row_comes_from_the_set_that_lags_most(
    mixture: tuple[list[int], list[int], list[float]], num_epochs: int
) -> None:
    sizes, lengths, weights = mixture
    order = mix(mixture)
    rows = rows_of(order, num_epochs)
    chosen = sets_of(rows, sizes)
    tokens = [
        iter([lengths[row] for row, own in zip(rows, chosen, strict=True) if own == number] + [1])
        for number in range(len(sizes))
    ]
    assert chosen == list(itertools.islice(choose_singly(tokens, weights), len(rows)))
    # An epoch has each row of the first set once, and ends where the first set's next pass would begin.
    for epoch in range(num_epochs):
        permutation = order.permutation(epoch).tolist()
        assert sorted(row for row in permutation if row < sizes[0]) == list(range(sizes[0]))
        assert permutation[0] < sizes[0]
        assert len(permutation) == order.epoch_rows(epoch)


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(1, 3), st.sampled_from([None, 1, 2, 4]))
def test_no_row_comes_again_before_all_others_of_its_set(
    mixture: tuple[list[int], list[int], list[float]], num_epochs: int, num_bins: int | None
) -> None:
    sizes = mixture[0]
    rows = rows_of(mix(mixture, **({"num_bins": num_bins} if num_bins else {})), num_epochs)
    chosen = sets_of(rows, sizes)
    for number, size in enumerate(sizes):
        own = [row for row, of in zip(rows, chosen, strict=True) if of == number]
        for start in range(0, len(own), size):
            assert max(Counter(own[start : start + size]).values()) == 1


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(1, 2))
def test_at_every_step_each_set_is_within_a_row_or_a_step_of_its_share(
    mixture: tuple[list[int], list[int], list[float]], num_epochs: int
) -> None:
    sizes, lengths, weights = mixture
    rows = rows_of(mix(mixture), num_epochs)
    own = np.zeros((len(rows) + 1, len(sizes)))
    own[np.arange(len(rows)) + 1, sets_of(rows, sizes)] = [lengths[row] for row in rows]
    own = own.cumsum(axis=0)
    lags = np.array(weights) / sum(weights) * own.sum(axis=1, keepdims=True) - own
    longest = max(lengths)
    assert (lags > -longest).all()  # never a row ahead
    # Behind: less than a row for two sets, less than one for each further set where there are more.
    assert (lags < longest * max(1, len(sizes) - 1)).all()


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(1, 3), st.sampled_from([1, 2, 3, 4]))
def test_with_buckets_every_set_runs_through_its_bins_in_order(
    mixture: tuple[list[int], list[int], list[float]], num_epochs: int, num_bins: int
) -> None:
    sizes = mixture[0]
    order = mix(mixture, num_bins=num_bins)
    rows = rows_of(order, num_epochs)
    chosen = sets_of(rows, sizes)
    for number, each in enumerate(order.sets):
        bin_of = {row: b for b, ranges in enumerate(each.bins) for row in range(*ranges[0])}
        own = [bin_of[row] for row, of in zip(rows, chosen, strict=True) if of == number]
        for start in range(0, len(own), each.num_rows):
            one_pass = own[start : start + each.num_rows]
            assert one_pass == sorted(one_pass)


@settings(deadline=None, max_examples=40)
@given(
    mixtures(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
)
def test_the_order_is_the_same_whatever_the_number_of_processes_and_after_a_resume(
    mixture: tuple[list[int], list[int], list[float]],
    batch: int,
    accumulation: int,
    dp_size: int,
    num_epochs: int,
    steps_done: int,
) -> None:
    order = mix(mixture)
    rows_per_step = batch * accumulation * dp_size

    def dealt(epoch: int, position: int) -> list[list[int]]:
        ranks = [
            list(
                StepSampler(
                    order, BatchShape(batch, accumulation, dp_size, rank), epoch, position, num_epochs
                )
            )
            for rank in range(dp_size)
        ]
        passes = [[row for micro_batch in same for row in micro_batch] for same in zip(*ranks, strict=True)]
        flat = [row for one in passes for row in one]
        return [flat[start : start + rows_per_step] for start in range(0, len(flat), rows_per_step)]

    steps = dealt(0, 0)
    expected, places = [], []
    for epoch in range(num_epochs):
        permutation = order.permutation(epoch).tolist()
        for start in range(0, len(permutation) - rows_per_step + 1, rows_per_step):
            expected.append(permutation[start : start + rows_per_step])
            places.append((epoch, start))
    assert steps == expected
    if places:
        at = min(steps_done, len(places) - 1)
        assert dealt(*places[at]) == expected[at:]


def test_the_order_depends_on_seed_epoch_and_weights() -> None:
    mixture = ([20, 30], [10] * 50, [1.0, 1.0])
    first = mix(mixture)
    assert first.permutation(1).tolist() == mix(mixture).permutation(1).tolist()
    others = [mix(mixture, seed=2), mix((*mixture[:2], [2.0, 1.0]))]
    assert all(first.permutation(0).tolist() != other.permutation(0).tolist() for other in others)
    assert first.permutation(0).tolist() != first.permutation(1).tolist()
    assert mix((*mixture[:2], [0.5, 0.5])).permutation(0).tolist() == first.permutation(0).tolist()


def test_equal_sets_have_equal_shares_and_whole_passes() -> None:
    order = mix(([12, 12], [7] * 24, [1.0, 1.0]))
    assert [order.epoch_rows(epoch) for epoch in range(4)] == [24] * 4
    assert order.start_of(4).counts == (48, 48)


# Many rows at once


@st.composite
def long_deals(draw: st.DrawFn) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Tokens of the next rows of each set, weights, and lags that rows dealt before may have left."""
    num_sets = draw(st.integers(2, 5))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    spread = draw(st.sampled_from([0, 1, 40, 99]))
    weights = draw(st.lists(st.integers(1, 100), min_size=num_sets, max_size=num_sets))
    num_rows = draw(st.integers(1, 3000))
    lengths = [
        generator.integers(100 - spread, 101, max(1, num_rows * weight // sum(weights))) for weight in weights
    ]
    before = [int(generator.integers(0, 200)) for _ in weights]
    return (
        lengths,
        weights,
        [w * sum(before) - sum(weights) * own for w, own in zip(weights, before, strict=True)],
    )


@settings(deadline=None, max_examples=60)
@given(long_deals(), st.sampled_from([(2, 4), (16, 16), (64, 64), (64, 2), (200, 100)]))
def test_windows_deal_what_one_row_after_the_other_would(
    dealt: tuple[list[np.ndarray], list[int], list[int]], window: tuple[int, int]
) -> None:
    lengths, weights, lags = dealt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "_ROWS_OF_WINDOW", window[0])
        patch.setattr(mixing, "_ROWS_BEFORE", window[1])
        choices = deal(lengths, weights, lags).tolist()
    own, singly, total = [0] * len(weights), [], sum(weights)
    counts = [0] * len(weights)
    while len(singly) < len(choices):
        behind = [lag + w * sum(own) - total * o for lag, w, o in zip(lags, weights, own, strict=True)]
        chosen = behind.index(max(behind))
        singly.append(chosen)
        own[chosen] += int(lengths[chosen][counts[chosen]])
        counts[chosen] += 1
    assert choices == singly
    assert choices


@pytest.mark.parametrize("sizes", [(9000, 3000), (3000, 9000, 500), (5000, 4000, 3000, 2000)])
def test_an_order_of_many_stretches_and_windows_is_that_of_one_row_after_the_other(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    lengths = np.random.default_rng(0).integers(300, 513, sum(sizes))
    mixture = (list(sizes), lengths.tolist(), [float(weight) for weight in (5, 3, 2, 7)[: len(sizes)]])
    monkeypatch.setattr(mixing, "_WINDOWS", 1)
    expected = rows_of(mix(mixture), 2)
    monkeypatch.undo()
    monkeypatch.setattr(mixing, "_ROWS_AT_ONCE", 4000)
    assert rows_of(mix(mixture), 2) == expected


# Weights


def test_weights_become_whole_numbers_in_the_same_proportions() -> None:
    assert whole_weights([0.75, 0.25]) == [3, 1]
    assert whole_weights([70, 20, 10]) == [7, 2, 1]
    assert whole_weights([5.0]) == [1]
    third, two_thirds = whole_weights([1 / 3, 2 / 3])
    assert two_thirds / third == pytest.approx(2, rel=1e-6)


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=20))
def test_whole_weights_are_close_and_small(weights: list[float]) -> None:
    whole = whole_weights(weights)
    assert all(number > 0 for number in whole)
    assert sum(whole) <= 1 << 30
    for weight, number in zip(weights, whole, strict=True):
        assert abs(weight / sum(weights) - number / sum(whole)) < 1e-6


# What is refused


def test_each_set_needs_a_weight() -> None:
    sets = make_sets([2, 3, 0], [1] * 5)
    assert find_weight_problems(sets, None) == find_weight_problems(sets[:2], [0.5, 2]) == []
    assert find_weight_problems(sets[:2], [0.5]) == [
        "--dataset_weights 0.5: one weight for each set is needed, and --dataset names 2 (set-0, set-1); "
        "give 2 weights, in this order"
    ]
    assert "set set-2 has no rows" in find_weight_problems(sets, [1, 1, 1])[0]


def test_too_many_passes_name_the_set_the_passes_and_a_weight_that_is_allowed() -> None:
    sets = make_sets([100, 10, 30], [10] * 140)
    assert find_repeat_problems(sets, [5, 2, 1], num_epochs=1, max_repeats=4) == []
    # 1000 / 0.5 x 0.3 = 600 tokens from 100.
    [problem] = find_repeat_problems(sets, [5, 3, 2], num_epochs=1, max_repeats=4)
    assert problem == (
        "--dataset_weights: set set-1 would be passed over 6 times in the run (its share is 30.000% of the "
        "tokens, about 600; it has 100), more than --max_repeats 4; give it a weight of at most 2, or more "
        "data, or raise --max_repeats"
    )
    assert find_repeat_problems(sets, [5, 2, 2], num_epochs=1, max_repeats=4) == []
    assert len(find_repeat_problems(sets, [5, 2, 8], num_epochs=2, max_repeats=4)) == 2
    # The first set has an epoch a pass, however many.
    assert find_repeat_problems(sets[:1], [1], num_epochs=9, max_repeats=4) == []


@settings(deadline=None, max_examples=40)
@given(mixtures(), st.integers(1, 3), st.integers(1, 5))
def test_no_set_is_passed_over_more_often_than_allowed(
    mixture: tuple[list[int], list[int], list[float]], num_epochs: int, max_repeats: int
) -> None:
    sizes, lengths, weights = mixture
    order = mix(mixture)
    problems = find_repeat_problems(order.sets, weights, num_epochs, max_repeats)
    counts = order.start_of(num_epochs).counts
    for each, count in list(zip(order.sets, counts, strict=True))[1:]:
        refused = any(f"set {each.name} " in problem for problem in problems)
        # The end of a run is within a few rows of the shares.
        assert refused or count <= max_repeats * each.num_rows + len(sizes) * max(lengths)


def test_the_order_takes_at_most_8_bytes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is dealt at once, and the lengths of all rows included."""
    monkeypatch.setattr(mixing, "_ROWS_AT_ONCE", 1 << 14)
    monkeypatch.setattr(order_module, "_ROWS_AT_ONCE", 1 << 14)
    peaks = []
    for num_rows in (100_000, 300_000):
        sets = make_sets([num_rows // 2] * 2, np.full(num_rows, 4096))
        tracemalloc.start()
        order = MixedOrder(sets, np.full(num_rows, 4096, dtype=np.uint16), 1, False, [3, 1])
        for _ in order.steps(0, 0, 64):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] <= 8 * 200_000
