"""comparison.md and comparison.png: the figures for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from colossal_llama.evaluation.comparison import ModelScores, NewRowsCost, Result
from colossal_llama.evaluation.ledger_figures import HARDLY_MOVED
from colossal_llama.evaluation.standing_rows import MEANS, NewRowsReport
from colossal_llama.utils.pictures import fonts_for, legend_columns, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Figures = TypeVar("Figures", Result, NewRowsCost)
# (set, category) -> model -> its figures.
Rows = dict[tuple[str, str | None], dict[str, Figures]]

# Fewer documents than this say little about others of their kind.
FEW_DOCUMENTS = 30
COLOURS = (
    "tab:blue",
    "tab:red",
    "tab:green",
    "tab:purple",
    "tab:orange",
    "tab:brown",
    "tab:pink",
    "tab:cyan",
)
# Letters that have room below a tick of the picture.
SHORT_NAME = 10
READING = """\
Bits per byte is the loss divided by the bytes of the text: lower is better, and models with different
tokenizers can be compared. The best of a row is **bold**. In brackets: the change against {base}, and its
95 % interval over documents. An interval that holds 0 shows no difference."""
NEW_ROWS = """\
Bits per byte that the new rows of the vocabulary take from the tokens that {base} has too: the difference
that masking their logits makes. It is part of the bits per byte above."""

UNUSED_ROWS = """\
Rows whose pieces this text has not once, and rows that moved by less than {share} of their length from where
they started. The start is the nearest of: the means of the rows of {base}, and the models here that
init_model.py made. Cosine 1 is the direction that a row started with."""
# Pieces that a cell of a table names.
NUM_NAMED = 5


def make_markdown(
    results: Sequence[Result],
    costs: Sequence[NewRowsCost],
    new_rows: Sequence[NewRowsReport],
    models: Sequence[ModelScores],
    context_bytes: int,
    stride_bytes: int,
) -> str:
    """The tables: a row for each set and category, a column for each model."""
    names = [model.name for model in models]
    base = _as_code(names[0])
    parts = [
        "# Comparison of models",
        READING.format(base=base),
        _bits_table(_rows(results), names),
        "## Tokens per character",
        _tokens_table(_rows(results), names),
    ]
    if costs:
        extended = [model for model in models if model.new_rows_losses is not None]
        parts += [
            "## Cost of new rows",
            NEW_ROWS.format(base=base),
            _costs_table(_rows(costs), [model.name for model in extended]),
            "\n".join(
                f"- {_as_code(model.name)}: {model.num_used_rows:,} of {model.num_new_rows:,} new rows occur "
                "in this text"
                for model in extended
            ),
        ]
    if new_rows:
        parts += [
            "## New rows that are not used",
            UNUSED_ROWS.format(base=base, share=f"{HARDLY_MOVED:.0%}"),
            _new_rows_table(new_rows),
        ]
    few = {result.set: result for result in results if result.category is None}
    few_sets = [_as_code(name) for name, result in few.items() if result.documents < FEW_DOCUMENTS]
    if few_sets:
        parts.append(
            f"Sets of fewer than {FEW_DOCUMENTS} documents, whose intervals are rough: {', '.join(few_sets)}"
        )
    parts.append(f"Context {context_bytes:,} bytes, stride {stride_bytes:,} bytes.")
    return "\n\n".join(parts) + "\n"


def _rows(figures: Sequence[Figures]) -> Rows[Figures]:
    """A category has a row where its set has several."""
    rows: Rows[Figures] = {}
    for each in figures:
        rows.setdefault((each.set, each.category), {})[each.model] = each
    num_rows = {name: sum(other == name for other, _ in rows) for name, _ in rows}
    return {key: row for key, row in rows.items() if key[1] is None or num_rows[key[0]] > 2}


def _bits_table(rows: Rows[Result], names: Sequence[str]) -> str:
    base, *others = names
    lines = []
    for key, row in rows.items():
        values = [result.bits_per_byte for result in row.values()]
        best = min(values) if min(values) < max(values) else None

        def bits(result: Result, best: float | None = best) -> str:
            text = f"{result.bits_per_byte:.4f}"
            return f"**{text}**" if result.bits_per_byte == best else text

        cells = [bits(row[base]), *(f"{bits(row[name])} ({_change(row[name])})" for name in others)]
        lines.append([*_first_cells(key), f"{row[base].documents:,}", *cells])
    return _table(["set", "category"], ["documents", *map(_as_code, names)], lines)


def _change(result: Result) -> str:
    if result.interval is None:
        return f"{result.change:+.4f}"
    low, high = result.interval
    return f"{result.change:+.4f}; {low:+.4f} to {high:+.4f}"


def _tokens_table(rows: Rows[Result], names: Sequence[str]) -> str:
    lines = [
        [*_first_cells(key), *(f"{row[name].tokens_per_character:.4f}" for name in names)]
        for key, row in rows.items()
    ]
    return _table(["set", "category"], list(map(_as_code, names)), lines)


def _costs_table(rows: Rows[NewRowsCost], names: Sequence[str]) -> str:
    lines = [
        [*_first_cells(key), *(f"{row[name].cost_of_new_rows:.4f}" for name in names)]
        for key, row in rows.items()
    ]
    return _table(["set", "category"], list(map(_as_code, names)), lines)


def _new_rows_table(reports: Sequence[NewRowsReport]) -> str:
    lines = []
    for report in reports:
        start = report.start or "not known"
        lines.append(
            [
                _as_code(report.model),
                start if report.start in (None, MEANS) else _as_code(start),
                f"{report.pieces:,}",
                _count_and_name(report.never_in_text),
                "is the start" if report.start == report.model else _count_and_name(report.hardly_moved),
                *(
                    "" if cosine is None else f"{cosine:.4f}"
                    for cosine in (report.median_input_cosine, report.median_output_cosine)
                ),
            ]
        )
    numbers = ["new pieces", "never in this text", "hardly moved", "median cosine, input", "output"]
    return _table(["model", "start"], numbers, lines)


def _count_and_name(pieces: Sequence[str] | None) -> str:
    """`7: a, b, c, …`"""
    if pieces is None:
        return ""
    named = ", ".join(map(_as_code, pieces[:NUM_NAMED])) + (", …" if len(pieces) > NUM_NAMED else "")
    return f"{len(pieces):,}" + (f": {named}" if pieces else "")


def _first_cells(key: tuple[str, str | None]) -> list[str]:
    set_name, category = key
    return [_as_code(set_name), "all" if category is None else _as_code(category)]


def _table(texts: Sequence[str], numbers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, with columns of numbers after those of text."""
    border = ["---"] * len(texts) + ["---:"] * len(numbers)
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*texts, *numbers], border, *lines))


def _as_code(text: str) -> str:
    return "`" + " ".join(text.replace("|", "\\|").replace("`", "'").split()) + "`"


def draw_comparison(results: Sequence[Result], names: Sequence[str], path: Path) -> None:
    """Writes the picture: bits per byte of each set by model, and the change against the base."""
    rows = {key[0]: row for key, row in _rows(results).items() if key[1] is None}
    with fonts_for([*names, *rows]):
        _draw_sets(rows, names).savefig(path, dpi=110, format="png")


def _draw_sets(rows: Mapping[str, Mapping[str, Result]], names: Sequence[str]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_panels = 2 if len(names) > 1 else 1
    width = max(5.5, 2.5 + 0.9 * len(names))
    height = max(4.5, 2 + 0.35 * len(names) * len(rows) if num_panels == 2 else 0)
    figure = Figure(figsize=(width + 7 * (num_panels - 1), min(height, 14)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw_bits(axes[0], rows, names)
    if num_panels == 2:
        _draw_changes(axes[1], rows, names)
    handles, labels = axes[0].get_legend_handles_labels()
    columns = legend_columns(labels, figure.get_figwidth(), most=6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _draw_bits(axis: Axes, rows: Mapping[str, Mapping[str, Result]], names: Sequence[str]) -> None:
    """A line for each set, over the models in the order in which they were given."""
    positions = range(len(names))
    for index, (set_name, row) in enumerate(rows.items()):
        values = [row[name].bits_per_byte for name in names]
        axis.plot(positions, values, color=_colour(index), marker="o", markersize=5, label=readable(set_name))
    slanted = {"rotation": 25, "ha": "right"} if max(map(len, names)) > SHORT_NAME else {}
    axis.set_xticks(positions, list(map(readable, names)), **slanted)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("bits per byte")
    axis.set_title("Held-out text")
    axis.grid(alpha=0.3)


def _draw_changes(axis: Axes, rows: Mapping[str, Mapping[str, Result]], names: Sequence[str]) -> None:
    """For each model but the base, the change of each set with its interval; to the left is better."""
    base, *others = names
    spread = 0.6 / max(1, len(rows))
    for index, (_, row) in enumerate(rows.items()):
        for place, name in enumerate(others):
            result = row[name]
            low, high = result.interval or (result.change, result.change)
            y = place + (index - (len(rows) - 1) / 2) * spread
            axis.plot([low, high], [y, y], color=_colour(index), linewidth=2, solid_capstyle="butt")
            axis.plot([result.change], [y], color=_colour(index), marker="o", markersize=5)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(others)), list(map(readable, others)))
    axis.set_ylim(len(others) - 0.5, -0.5)
    axis.set_xlabel("change of bits per byte, with its 95 % interval (left: better)")
    axis.set_title(f"Change against {readable(base)}")
    axis.grid(alpha=0.3)
