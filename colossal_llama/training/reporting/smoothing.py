"""The smoothed line of a curve."""

from __future__ import annotations

import numpy as np

# Width of the smoothing (the Gaussian's standard deviation): this share of the run's steps, up to a limit.
SMOOTHED_SHARE = 1 / 60
LARGEST_WIDTH = 500.0
# Fewer steps than this are drawn with a mark each, and not smoothed.
FEW_STEPS = 20


def smooth(values: list[float]) -> list[float]:
    """Means weighted with a Gaussian around each step, so that the curve does not lag behind a falling loss;
    at both ends over the steps that are there.
    """
    if len(values) < FEW_STEPS:
        return values
    width = min(max(1.0, SMOOTHED_SHARE * len(values)), LARGEST_WIDTH)
    offsets = np.arange(-int(3 * width), int(3 * width) + 1)
    kernel = np.exp(-0.5 * (offsets / width) ** 2)
    sums = np.convolve(values, kernel, mode="same") / np.convolve(np.ones(len(values)), kernel, mode="same")
    return sums.tolist()
