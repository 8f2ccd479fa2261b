"""The learning rate as a function of the optimizer step: linear warm-up, then a cosine down to a tenth."""

from __future__ import annotations

import math
from dataclasses import dataclass

FINAL_FRACTION = 0.1


@dataclass(frozen=True)
class LearningRateSchedule:
    """`peak` after `warmup_steps`, `peak / 10` at `total_steps`."""

    peak: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * 0.5 * (1 + math.cos(math.pi * progress)))
