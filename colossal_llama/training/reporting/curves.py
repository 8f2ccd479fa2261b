"""The picture of a run: loss by step and by tokens, evaluations, learning rate; and the stages joined."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.training.reporting.metrics import CURVES_FILE, read_all_stages
from colossal_llama.training.reporting.set_curves import draw_sets, find_sets
from colossal_llama.training.reporting.smoothing import FEW_STEPS, smooth
from colossal_llama.utils.console import warn
from colossal_llama.utils.pictures import fonts_for, legend_columns, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

STEP_AXIS, TOKEN_AXIS = "optimizer step", "tokens seen"
BITS = "eval_bits_per_byte"
ALL_SETS = "all sets"
# Of the held-out sets; blue, orange and green are those of the other panels.
SET_COLOURS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray")


@dataclass
class Curve:
    """One stage, placed behind the stages before it: values by optimizer step and by tokens seen."""

    steps: list[int]
    tokens: list[int]
    losses: list[float]
    smoothed: list[float]
    learning_rates: list[float]
    eval_steps: list[int]
    eval_tokens: list[int]
    eval_losses: list[float]
    bits_per_byte: dict[str, tuple[list[int], list[float]]]  # held-out set -> steps and values


def make_curve(records: list[dict[str, Any]], step_offset: int = 0, token_offset: int = 0) -> Curve:
    evaluated = [record for record in records if record.get("eval_loss") is not None]
    bits_per_byte: dict[str, tuple[list[int], list[float]]] = {}
    for record in evaluated:
        for name, value in record.items():
            figure, _, set_name = name.partition("/")
            if figure == BITS and value is not None:
                steps, values = bits_per_byte.setdefault(set_name or ALL_SETS, ([], []))
                steps.append(step_offset + record["step"])
                values.append(value)
    records = [record for record in records if record.get("loss") is not None]
    losses = [record["loss"] for record in records]
    return Curve(
        steps=[step_offset + record["step"] for record in records],
        tokens=[token_offset + record["tokens"] for record in records],
        losses=losses,
        smoothed=smooth(losses),
        learning_rates=[record["lr"] for record in records],
        eval_steps=[step_offset + record["step"] for record in evaluated],
        eval_tokens=[token_offset + record["tokens"] for record in evaluated],
        eval_losses=[record["eval_loss"] for record in evaluated],
        bits_per_byte=bits_per_byte,
    )


def join_stages(stages: list[list[dict[str, Any]]]) -> list[Curve]:
    """Curves of all stages, each beginning at the step and the token where the one before ended."""
    curves, step, tokens = [], 0, 0
    for records in stages:
        curves.append(make_curve(records, step, tokens))
        step, tokens = curves[-1].steps[-1], curves[-1].tokens[-1]
    return curves


def draw_curves(directory: Path) -> Path | None:
    """Writes `training_curves.png` from the metrics in a directory; returns its path, None without metrics.

    A first row of panels shows the run. One that started from an earlier run's weights has a second row, with
    all stages joined. Where held-out sets were evaluated, a last panel has the bits per byte of each; where
    the data has several sets, a last row compares them.
    """
    stages = read_all_stages(directory)
    has_losses = [any(record.get("loss") is not None for record in records) for records in stages]
    if not has_losses[-1]:
        return None
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        warn(f"no {CURVES_FILE}: {error}")
        return None
    stages = [records for records, has_loss in zip(stages, has_losses, strict=True) if has_loss]
    rows = [("", [make_curve(stages[-1])])]
    if len(stages) > 1:
        rows.append((f", {len(stages)} stages joined", join_stages(stages)))
    set_names = list(
        dict.fromkeys(name for _, curves in rows for curve in curves for name in curve.bits_per_byte)
    )
    path = directory / CURVES_FILE
    with fonts_for([*set_names, *find_sets(stages[-1])]):
        _draw_run(rows, set_names, stages[-1]).savefig(path, dpi=110)
    return path


def _draw_run(
    rows: list[tuple[str, list[Curve]]], set_names: list[str], records: list[dict[str, Any]]
) -> Figure:
    """The panels of each row (title, curves), and where the records tell sets of the data apart, those."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_panels = 4 if set_names else 3
    has_sets = bool(find_sets(records))
    size = (16 / 3 * num_panels, 4.8 * (len(rows) + has_sets))
    picture = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(picture)
    figure: FigureBase = picture
    if has_sets:
        figure, below = picture.subfigures(2, 1, height_ratios=[len(rows), 1])
        for axis in draw_sets(below, records):
            _finish(axis, rows[0][1], STEP_AXIS, axis.get_title())
    panels = figure.subplots(len(rows), num_panels, squeeze=False)
    for axes, (title, curves) in zip(panels, rows, strict=True):
        _draw_losses(axes[0], curves, STEP_AXIS, f"Loss by step{title}")
        _draw_losses(axes[1], curves, TOKEN_AXIS, f"Loss by tokens{title}")
        _draw_learning_rate(axes[2], curves, f"Learning rate{title}")
        if set_names:
            _draw_bits_per_byte(axes[3], curves, set_names, f"Held-out text by step{title}")
    figure.suptitle(_headline(rows[0][1][0]), fontsize=11)
    # Beside the panels: inside, it would hide a part of some curve. Each label once, however many stages.
    named = {}
    for axis in (panels[-1, 1], *panels[-1, 3:]):
        handles, labels = axis.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    columns = legend_columns(list(named), size[0], most=7)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)
    return picture


def _headline(curve: Curve) -> str:
    words = f"{len(curve.steps):,} steps, {curve.tokens[-1]:,} tokens; "
    words += f"loss at the end {curve.smoothed[-1]:.4f} (smoothed)"
    return words + (f", evaluation {curve.eval_losses[-1]:.4f}" if curve.eval_losses else "")


def _draw_losses(axis: Axes, curves: list[Curve], unit: str, title: str) -> None:
    for curve in curves:
        by_step = unit == STEP_AXIS
        positions = curve.steps if by_step else curve.tokens
        marks = {"marker": "o" if len(positions) < FEW_STEPS else None, "markersize": 3}
        axis.plot(positions, curve.losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="every step")
        axis.plot(positions, curve.smoothed, color="tab:blue", linewidth=1.8, label="smoothed", **marks)
        if curve.eval_losses:
            eval_positions = curve.eval_steps if by_step else curve.eval_tokens
            marks = {"marker": "o", "markersize": 4}
            axis.plot(
                eval_positions,
                curve.eval_losses,
                color="tab:orange",
                linewidth=1,
                label="evaluation",
                **marks,
            )
    axis.set_ylabel("loss, nats per token")
    _finish(axis, curves, unit, title)


def _draw_learning_rate(axis: Axes, curves: list[Curve], title: str) -> None:
    for curve in curves:
        mark = "o" if len(curve.steps) < FEW_STEPS else None
        axis.plot(curve.steps, curve.learning_rates, color="tab:green", marker=mark, markersize=3)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("learning rate")
    axis.yaxis.set_major_formatter(lambda value, _: shorten_rate(value))
    _finish(axis, curves, STEP_AXIS, title)


def _draw_bits_per_byte(axis: Axes, curves: list[Curve], set_names: list[str], title: str) -> None:
    """One line for each set, in the colour that it has in all stages; all sets together are dashed."""
    alone = set_names == [ALL_SETS]
    colours = dict(zip([name for name in set_names if name != ALL_SETS], cycle(SET_COLOURS)))
    for curve in curves:
        for name in set_names:
            if name not in curve.bits_per_byte:
                continue
            is_sum = name == ALL_SETS and not alone
            axis.plot(
                *curve.bits_per_byte[name],
                color="black" if is_sum else colours.get(name, SET_COLOURS[0]),
                linestyle="--" if is_sum else "-",
                linewidth=1 if is_sum else 1.6,
                marker="o",
                markersize=3.5,
                label="bits per byte" if alone else f"bits per byte, {readable(name)}",
            )
    axis.set_ylabel("bits per byte of text")
    _finish(axis, curves, STEP_AXIS, title)


def _finish(axis: Axes, curves: list[Curve], unit: str, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, before in enumerate(curves[:-1], start=2):
        border = before.steps[-1] if unit == STEP_AXIS else before.tokens[-1]
        axis.axvline(border, color="0.4", linestyle="--", linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (4, 0), "textcoords": "offset points"}
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axis.annotate(f"stage {number}", (border, 0.97), rotation=90, va="top", fontsize=8, bbox=box, **place)
    axis.set_xlabel(unit)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    least = 1e5 if unit == STEP_AXIS else 1e3
    axis.xaxis.set_major_formatter(lambda value, _: shorten(value, least))


def shorten(number: float, least: float) -> str:
    """1500 -> 1.5k, 8.5e9 -> 8.5B: a tick of an axis; numbers below `least` are written out."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(limit, least):
            return f"{number / limit:g}{suffix}"
    return f"{number:,.0f}"


def shorten_rate(rate: float) -> str:
    """0.00025 -> 2.5e-4."""
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}" if rate else "0"
