"""The panels of `training_curves.png` that compare the sets of a run's data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colossal_llama.training.reporting.set_figures import LOSS, PASSES, SHARE
from colossal_llama.training.reporting.smoothing import FEW_STEPS, smooth
from colossal_llama.utils.pictures import legend_columns, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

# Of the sets, in their order, over and over.
_COLORS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray")
# Beginning of a figure's name -> what its panel shows.
PANELS = {LOSS: "Loss by set", SHARE: "Share of the tokens so far", PASSES: "Passes over each set"}


def find_sets(records: list[dict[str, Any]]) -> list[str]:
    """Names of the sets that the records tell apart, in their order."""
    names = (name for record in records for name in record if name.startswith(LOSS))
    return [name.removeprefix(LOSS) for name in dict.fromkeys(names)]


def values_of(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a figure, where it has one: a step may have no token of a set."""
    found = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def draw_sets(figure: FigureBase, records: list[dict[str, Any]]) -> list[Axes]:
    """Draws a row of panels with a line for each set; returns them for their axes to be finished."""
    names = find_sets(records)
    axes = figure.subplots(1, len(PANELS))
    for axis, (figure_name, title) in zip(axes, PANELS.items(), strict=True):
        for number, name in enumerate(names):
            steps, values = values_of(records, figure_name + name)
            marker = "o" if len(steps) < FEW_STEPS else None
            color = _COLORS[number % len(_COLORS)]
            drawn = smooth(values) if figure_name == LOSS else values
            axis.plot(steps, drawn, color=color, label=readable(name), marker=marker, markersize=3)
        axis.set_title(title)
    axes[0].set_ylabel("loss, nats per token, smoothed")
    axes[1].set_ylabel("share of the tokens")
    axes[1].set_ylim(bottom=0)
    axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes[2].set_ylabel("passes")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = legend_columns(labels, figure.bbox.width / figure.dpi, most=7)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return list(axes)
