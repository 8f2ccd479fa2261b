"""The learning rate as a function of the optimizer step: linear warm-up, perhaps a time at the peak, a decay.

    rate                ______________
                      /                \\
                    /                    \\
                  /                        \\___   min_ratio x peak
        step    0     warmup_steps     decay_start  total_steps

`cosine` and `linear` decay as soon as the warm-up is over, `constant` never does, `wsd` (warm-up, stable,
decay) stays at the peak until `decay_start`. A new shape of decay is a function here and a line in `SHAPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from colossal_llama.utils.arguments import non_negative_int, number, positive_int
from colossal_llama.utils.settings import OnResume, flag

MIN_RATIO = 0.1
# Of all steps, where --warmup_steps and --decay_steps are not given.
WARMUP_SHARE = 0.025
DECAY_SHARE = 0.1


def cosine(progress: float) -> float:
    """Half a period: slow at both ends."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    return 1 - progress


def sqrt(progress: float) -> float:
    """Fast at the beginning."""
    return 1 - math.sqrt(progress)


def constant(progress: float) -> float:
    """No decay."""
    return 1.0


# What is left of the decay, from 1 to 0, at a progress from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "sqrt": sqrt,
    "linear": linear,
    "cosine": cosine,
    "constant": constant,
}


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate falls. Steps are those of the schedule, counted from 0."""

    lr_schedule: str = flag(
        "cosine",
        "course of the learning rate after the warm-up: a decay to the last step (cosine, linear), none "
        "(constant), or one at the end (wsd)",
        choices=("cosine", "linear", "constant", "wsd"),
        on_resume=OnResume.SCHEDULE,
    )
    min_lr_ratio: float = flag(
        MIN_RATIO,
        "where the decay ends, as a share of --lr",
        type=number(float, minimum=0, maximum=1),
        on_resume=OnResume.SCHEDULE,
    )
    decay_steps: int | None = flag(
        None,
        "wsd: optimizer steps of the decay (default: 10 %% of the steps)",
        type=positive_int,
        on_resume=OnResume.SCHEDULE,
    )
    decay_start: int | None = flag(
        None,
        "wsd: optimizer steps before the decay, after which the run ends (default: so that the decay ends "
        "with the data)",
        type=non_negative_int,
        on_resume=OnResume.SCHEDULE,
    )
    decay_shape: str = flag(
        "sqrt",
        "wsd: shape of the decay",
        choices=tuple(name for name in SHAPES if name != "constant"),
        on_resume=OnResume.SCHEDULE,
    )

    def conflicts(self) -> list[str]:
        """Flags of a decay that the schedule does not have."""
        if self.lr_schedule == "wsd":
            return []
        return [
            f"--{name} {value}: only for --lr_schedule wsd, not {self.lr_schedule}; add it, or leave this out"
            for name in ("decay_steps", "decay_start")
            if (value := getattr(self, name)) is not None
        ]


@dataclass(frozen=True)
class LearningRateSchedule:
    """`peak` after `warmup_steps` until `decay_start`, `min_ratio * peak` at `total_steps`.

    Attributes:
        shape: of the decay, a name in `SHAPES`.
        decay_start: steps before the decay; None for the end of the warm-up.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    shape: str = "cosine"
    min_ratio: float = MIN_RATIO
    decay_start: int | None = None

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        begin = self.warmup_steps if self.decay_start is None else self.decay_start
        if step < begin:
            return self.peak
        progress = min(1.0, (step - begin) / max(1, self.total_steps - begin))
        left = SHAPES[self.shape](progress)
        return self.peak if left == 1 else self.peak * (self.min_ratio + (1 - self.min_ratio) * left)

    def __str__(self) -> str:
        """For people: "0.0003, from step 900 down to 3e-05 at step 1,000"."""
        if self.shape == "constant":
            return f"{self.peak:g} to the last step"
        down = f"down to {self.peak * self.min_ratio:g}"
        if self.decay_start is None:
            return f"{self.peak:g} {down}"
        return f"{self.peak:g}, from step {self.decay_start:,} {down} at step {self.total_steps:,}"

    def to_json(self) -> dict[str, Any]:
        """What `lr_scheduler` of a checkpoint holds, beside the step; defaults are left out."""
        return {
            each.name: value for each in fields(self) if (value := getattr(self, each.name)) != each.default
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LearningRateSchedule:
        """Reads what any version wrote."""
        return cls(**{each.name: value[each.name] for each in fields(cls) if each.name in value})


def default_warmup(total_steps: int) -> int:
    return int(total_steps * WARMUP_SHARE)


def make_schedule(
    wanted: ScheduleSettings, peak: float, warmup_steps: int, data_steps: int
) -> LearningRateSchedule:
    """The schedule that the settings ask for.

    Args:
        data_steps: optimizer steps that the data has in all epochs.
    """
    if wanted.lr_schedule != "wsd":
        return LearningRateSchedule(peak, warmup_steps, data_steps, wanted.lr_schedule, wanted.min_lr_ratio)
    decay_steps = wanted.decay_steps or max(1, round(DECAY_SHARE * data_steps))
    start = data_steps - decay_steps if wanted.decay_start is None else wanted.decay_start
    return LearningRateSchedule(
        peak, warmup_steps, start + decay_steps, wanted.decay_shape, wanted.min_lr_ratio, start
    )


def find_misfits(schedule: LearningRateSchedule, data_steps: int) -> list[str]:
    """What of a wsd schedule does not fit the run, each with its remedy."""
    if schedule.decay_start is None:
        return []
    start, end, problems = schedule.decay_start, schedule.total_steps, []
    if end > data_steps:
        problems.append(
            f"--decay_start {start}: the decay takes {end - start} steps (--decay_steps, or 10 % of the "
            f"steps) and ends at step {end}, but the data has only {data_steps}; lower one of them, or raise "
            "--num_epochs"
        )
    if start < schedule.warmup_steps:
        problems.append(
            f"--lr_schedule wsd: its decay of {end - start} steps begins at step {start}, before the "
            f"{schedule.warmup_steps} steps of warm-up are over; lower --decay_steps or --warmup_steps, or "
            "raise --decay_start"
        )
    return problems
