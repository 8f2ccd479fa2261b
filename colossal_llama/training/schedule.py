"""The learning rate as a function of the optimizer step: linear warm-up, then a decay to a tenth.

A new shape of decay is a function here and a line in `SHAPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FINAL_FRACTION = 0.1


def cosine(progress: float) -> float:
    """Half a period: slow at both ends."""
    return 0.5 * (1 + math.cos(math.pi * progress))


# What is left of the decay, from 1 to 0, at a progress from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {"cosine": cosine}


@dataclass(frozen=True)
class LearningRateSchedule:
    """`peak` after `warmup_steps`, `peak / 10` at `total_steps`."""

    peak: float
    warmup_steps: int
    total_steps: int
    shape: str = "cosine"

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * SHAPES[self.shape](progress))

    def to_json(self) -> dict[str, Any]:
        """What `lr_scheduler` of a checkpoint holds, beside the step."""
        return {"peak": self.peak, "warmup_steps": self.warmup_steps, "total_steps": self.total_steps}
