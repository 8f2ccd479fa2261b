"""Where a run stands, and where it continues when a step has another number of rows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.data.order import BatchShape, RowOrder, StepSampler
from colossal_llama.training.schedule import LearningRateSchedule
from colossal_llama.training.state import TrainState


class Order(RowOrder):
    """Rows of epoch e are numbered from 1000 e on."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def permutation(self, epoch: int) -> list[int]:
        return [1000 * epoch + row for row in range(self.num_rows)]


def rows_of(state: TrainState, num_rows: int, rows_per_step: int, num_epochs: int) -> list[int]:
    plan = BatchShape(rows_per_step, 1, 1, 0)
    sampler = StepSampler(Order(num_rows), plan, state.epoch, state.position, num_epochs)
    return [row for batch in sampler for row in batch]


@st.composite
def resumed_runs(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Rows, rows of a step before and after, epochs, and the steps that were done before."""
    num_rows = draw(st.integers(1, 60))
    before, after = (draw(st.integers(1, min(9, num_rows))) for _ in range(2))
    num_epochs = draw(st.integers(1, 3))
    return num_rows, before, after, num_epochs, draw(st.integers(1, num_epochs * (num_rows // before)))


@given(resumed_runs())
def test_another_number_of_rows_per_step_continues_at_the_same_row(
    run: tuple[int, int, int, int, int],
) -> None:
    num_rows, before, after, num_epochs, steps = run
    state = TrainState()
    for _ in range(steps):
        state.advance(before, before, num_rows)
    seen = rows_of(TrainState(), num_rows, before, num_epochs)[: steps * before]
    total = num_epochs * (num_rows // after)
    state.change_rows_per_step(after, lambda epoch: num_rows, num_epochs, total)
    rest = rows_of(state, num_rows, after, num_epochs)
    # No row twice; of an epoch, only a tail shorter than a step may be left out.
    assert not set(seen) & set(rest)
    for epoch in range(num_epochs):
        used = [row for row in seen + rest if row // 1000 == epoch]
        assert len(used) > num_rows - max(before, after)
        assert used == sorted(used)
    # The schedule ends with the last row, and is about as far as the rows are.
    steps_left = len(rest) // after
    assert state.step + state.schedule_offset + steps_left == total
    share = (state.step + state.schedule_offset) / total
    tails = 1.5 * (before + after) / num_rows
    assert abs(share - len(seen) / (num_epochs * num_rows)) <= 1.5 * num_epochs / total + tails


def test_the_same_number_of_rows_changes_nothing() -> None:
    state = TrainState()
    for _ in range(7):
        state.advance(4, 4, 10)
    before = state.to_json()
    state.change_rows_per_step(4, lambda epoch: 10, 5, 10)
    assert state.to_json() == before
    schedule = LearningRateSchedule(1.0, 2, 10)
    assert schedule.at(state.step + state.schedule_offset) == schedule.at(7)
