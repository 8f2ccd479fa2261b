"""The learning rate against a formula written down once more, in another form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import make_config, plugin_of

from colossal_llama.training.arguments import build_parser, parse_settings
from colossal_llama.training.plan import make_plan
from colossal_llama.training.reporting.rate_chart import HEIGHT, WIDTH, draw_rate
from colossal_llama.training.schedule import SHAPES, LearningRateSchedule, ScheduleSettings, find_misfits
from colossal_llama.utils.settings import flags_of

# What of the decay is over at a progress from 0 to 1, for each shape.
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: p,
    "sqrt": lambda p: p**0.5,
    "cosine": lambda p: math.sin(math.pi * p / 2) ** 2,
}
SCHEDULES = flags_of([ScheduleSettings])["lr_schedule"].choices


def test_every_shape_has_a_formula() -> None:
    assert set(FALLS) | {"constant"} == set(SHAPES), "a formula for each shape, written a second time"
    assert set(SCHEDULES) <= {*SHAPES, "wsd"}


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


@st.composite
def schedule_flags(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    """Flags of a schedule that fits, and the optimizer steps that the data has."""
    flags: dict[str, object] = {"num_epochs": draw(st.integers(1, 3)), "lr": draw(st.floats(1e-7, 1.0))}
    total = flags["num_epochs"] * draw(st.integers(1, 120))
    flags["lr_schedule"] = draw(st.sampled_from(SCHEDULES))
    flags["min_lr_ratio"] = draw(st.sampled_from([0.0, 0.1, 0.37, 1.0]) | st.floats(0, 1))
    warmup = int(0.025 * total)
    if draw(st.booleans()):
        flags["warmup_steps"] = warmup = draw(st.integers(0, total - 1))
    if flags["lr_schedule"] == "wsd":
        flags["decay_shape"] = draw(st.sampled_from(sorted(FALLS)))
        decay = max(1, round(0.1 * total))
        if decay > total - warmup or draw(st.booleans()):
            flags["decay_steps"] = decay = draw(st.integers(1, total - warmup))
        if draw(st.booleans()):
            flags["decay_start"] = draw(st.integers(warmup, total - decay))
    return flags, total


def rate_as_documented(flags: dict[str, object], total: int) -> tuple[Callable[[int], float], int]:
    """The rate of step k, and the number of steps, written from the documentation alone."""
    w = flags.get("warmup_steps", total * 25 // 1000)
    kind, ratio = flags["lr_schedule"], flags["min_lr_ratio"]
    begin, end, shape = w, total, kind
    if kind == "wsd":
        length = flags.get("decay_steps", max(1, round(total / 10)))
        begin = flags.get("decay_start", total - length)
        end, shape = begin + length, flags["decay_shape"]

    def rate(k: int) -> float:
        if k < w:
            return flags["lr"] * (k + 1) / w
        if kind == "constant" or k < begin:
            return flags["lr"]
        p = (k - begin) / (end - begin)
        return flags["lr"] * (1 - (1 - ratio) * FALLS[shape](p))

    return rate, end


@given(schedule_flags())
def test_every_step_has_the_documented_rate(drawn: tuple[dict[str, object], int]) -> None:
    flags, total = drawn
    rows = 8 * total // flags["num_epochs"]
    plugin = plugin_of(" ".join(f"--{name} {value!r}" for name, value in flags.items()).replace("'", ""), 1)
    plan = make_plan(plugin, make_config(), range_of_rows(rows))
    rate, end = rate_as_documented(flags, total)
    assert (plan.data_steps, plan.total_steps) == (total, end)
    assert find_misfits(plan.schedule, plan.data_steps) == []
    for step in range(end):
        assert plan.schedule.at(step) == pytest.approx(rate(step), rel=1e-9)
    again = LearningRateSchedule.from_json(plan.schedule.to_json())
    assert again == plan.schedule


def range_of_rows(count: int):
    from colossal_llama.training.data.random_rows import RandomRows

    return RandomRows(count, 8, 128, 0)


@given(schedule_flags())
def test_the_chart_has_a_mark_for_every_column(drawn: tuple[dict[str, object], int]) -> None:
    flags, total = drawn
    plugin = plugin_of(" ".join(f"--{name} {value!r}" for name, value in flags.items()).replace("'", ""), 1)
    schedule = make_plan(plugin, make_config(), range_of_rows(8 * total // flags["num_epochs"])).schedule
    title, *rows, axis, labels = draw_rate(schedule).splitlines()
    assert (title, len(rows)) == ("learning rate by step", HEIGHT)
    columns = min(WIDTH, schedule.total_steps)
    assert axis.count("-") == columns
    marks = [line.partition("|")[2].ljust(columns) for line in rows]
    for column in range(columns):
        assert "".join(mark[column] for mark in marks).count("*") == 1
    assert labels.split() == ["0", f"{schedule.total_steps - 1:,}"]


def test_the_chart_of_a_stable_phase_and_its_decay() -> None:
    chart = draw_rate(LearningRateSchedule(3e-4, 0, 100, "linear", 0.0, decay_start=90)).splitlines()
    assert chart[1] == " 3.0e-04 |" + "*" * 65
    assert chart[-3].startswith(" 0.0e+00 |")
    assert chart[-1].split() == ["0", "99"]


def test_a_constant_rate_is_exactly_the_peak() -> None:
    """So that a branch from it leaves the past as it was."""
    for shape in ("sqrt", "linear", "cosine"):
        schedule = LearningRateSchedule(3e-4, 3, 50, shape, min_ratio=0.37, decay_start=40)
        flat = LearningRateSchedule(3e-4, 3, 50, "constant")
        assert [schedule.at(step) for step in range(41)] == [flat.at(step) for step in range(41)]
        assert schedule.at(41) < flat.at(41)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--decay_start 8 --decay_steps 3", "--decay_start 8: .* ends at step 11, but the data has only 10"),
        ("--decay_steps 9 --warmup_steps 2", "decay of 9 steps begins at step 1, before the 2 steps of"),
        ("--decay_steps 11", "decay of 11 steps begins at step -1"),
        ("--warmup_steps 10", "decay of 1 steps begins at step 9, before the 10 steps of warm-up"),
    ],
)
def test_a_decay_that_does_not_fit(flags: str, problem: str) -> None:
    import re

    plan = make_plan(plugin_of(f"--lr_schedule wsd {flags}", 1), make_config(), range_of_rows(80))
    (found,) = find_misfits(plan.schedule, plan.data_steps)
    assert re.search(problem, found)


@pytest.mark.parametrize("flag", ["--decay_steps 3", "--decay_start 3"])
def test_flags_of_a_decay_need_wsd(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_settings(["--pretrained", "some/model", "--benchmark", *flag.split()])
    assert f"{flag}: only for --lr_schedule wsd, not cosine" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--min_lr_ratio", "1.5"])
