"""The learning rate drawn with characters, for a plan."""

from __future__ import annotations

from colossal_llama.training.schedule import LearningRateSchedule

WIDTH, HEIGHT = 72, 8


def draw_rate(schedule: LearningRateSchedule) -> str:
    """A chart of the learning rate over all steps of a schedule.

    3.0e-04 |  *************************
            |                           *
            |                            *
            | *                           **
            |                               **
            |                                 *
            |                                  *
    0.0e+00 |*
            +-----------------------------------
             0                               999
    """
    columns = min(WIDTH, schedule.total_steps)
    steps = [round(column * (schedule.total_steps - 1) / max(1, columns - 1)) for column in range(columns)]
    rates = [schedule.at(step) for step in steps]
    top = max(rates) or 1.0
    heights = [round(rate / top * (HEIGHT - 1)) for rate in rates]
    lines = []
    for height in range(HEIGHT - 1, -1, -1):
        label = f"{top * height / (HEIGHT - 1):.1e}" if height in (0, HEIGHT - 1) else ""
        marks = "".join("*" if each == height else " " for each in heights)
        lines.append(f"{label:>8} |{marks}".rstrip())
    last = f"{steps[-1]:,}"
    lines.append(f"{'':>8} +{'-' * columns}")
    lines.append(f"{'':>8}  0{last:>{max(columns - 1, len(last) + 1)}}")
    return "\n".join(["learning rate by step", *lines])
