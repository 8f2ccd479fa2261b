"""The learning rate against a formula written down once more, in another form."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.schedule import LearningRateSchedule


def expected(peak: float, warmup: int, total: int, step: int) -> float:
    """Warm-up counts the step itself; the cosine's (1 + cos x) / 2 is written as cos^2 of x / 2."""
    if step + 1 <= warmup:
        return peak / warmup * (step + 1)
    share = min(1.0, (step - warmup) / (total - warmup)) if total > warmup else float(step > warmup)
    lowest = peak / 10
    return lowest + (peak - lowest) * math.cos(share * math.pi / 2) ** 2


@given(st.floats(1e-7, 1.0), st.integers(0, 50), st.integers(1, 200), st.integers(0, 250))
def test_equals_the_formula(peak: float, warmup: int, total: int, step: int) -> None:
    schedule = LearningRateSchedule(peak, warmup, total)
    assert schedule.at(step) == pytest.approx(expected(peak, warmup, total, step), rel=1e-9)


@given(st.integers(0, 50), st.integers(1, 200))
def test_rises_then_falls_and_stays_in_range(warmup: int, length: int) -> None:
    total = warmup + length
    rates = [LearningRateSchedule(3e-4, warmup, total).at(step) for step in range(total + 5)]
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(3e-4)


def test_hand_computed_points() -> None:
    schedule = LearningRateSchedule(peak=1.0, warmup_steps=4, total_steps=104)
    assert [schedule.at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.at(54) == pytest.approx(0.55)
    assert schedule.at(104) == pytest.approx(0.1)
    assert schedule.at(1000) == pytest.approx(0.1)


def test_equals_torchs_cosine_annealing_after_warm_up() -> None:
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=3e-5)
    ours = LearningRateSchedule(3e-4, 0, 40)
    for step in range(41):
        assert ours.at(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        theirs.step()
