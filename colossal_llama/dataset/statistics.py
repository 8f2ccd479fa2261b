"""What is counted in preparation: `stats.json`, the table at the end, the picture of document lengths."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from colossal_llama.dataset.encoders.base import Outcome
from colossal_llama.dataset.piece_counts import RARE_LIMITS
from colossal_llama.utils.console import format_table

MAX_CATEGORIES_IN_TABLE = 30


@dataclass
class Counts:
    """Records, documents and tokens of one category, or of several together.

    tokens_in = tokens_out + the sum of dropped_tokens, and documents = kept + the sum of dropped_documents.
    """

    documents: int = 0
    kept: int = 0
    pieces: int = 0
    characters: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dropped_documents: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add_outcome(self, outcome: Outcome, num_characters: int) -> None:
        self.documents += 1
        self.characters += num_characters
        self.tokens_in += outcome.num_tokens
        self.pieces += len(outcome.pieces)
        self.tokens_out += sum(map(len, outcome.pieces))
        if outcome.pieces:
            self.kept += 1
        else:
            self.dropped_documents[outcome.reason] += 1
        if outcome.dropped_tokens:
            self.dropped_tokens.update(outcome.dropped_tokens)
        for note in outcome.notes:
            self.notes[note] += 1

    def add(self, other: Counts) -> None:
        for name in ("documents", "kept", "pieces", "characters", "tokens_in", "tokens_out"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped_documents", "dropped_tokens", "notes"):
            getattr(self, name).update(getattr(other, name))

    def as_json(self) -> dict[str, Any]:
        assert self.tokens_in == self.tokens_out + self.dropped_tokens.total()
        assert self.documents == self.kept + self.dropped_documents.total()
        return {
            "documents": self.documents,
            "kept": self.kept,
            "pieces": self.pieces,
            "characters": self.characters,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "tokens_per_character": _ratio(self.tokens_in, self.characters),
            "dropped_documents": dict(sorted(self.dropped_documents.items())),
            "dropped_tokens": dict(sorted(self.dropped_tokens.items())),
            "notes": dict(sorted(self.notes.items())),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Counts:
        fields = {name: value[name] for name in cls.__dataclass_fields__}
        for name in ("dropped_documents", "dropped_tokens", "notes"):
            fields[name] = Counter(fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class DocumentCounts:
    """Counts by category, and by input directory in their order."""

    categories: dict[str, Counts]
    input_dirs: list[Counts]

    @property
    def total(self) -> Counts:
        total = Counts()
        for counts in self.categories.values():
            total.add(counts)
        return total

    def as_json(self) -> dict[str, Any]:
        return {
            "categories": {name: self.categories[name].as_json() for name in sorted(self.categories)},
            "input_dirs": [counts.as_json() for counts in self.input_dirs],
        }


@dataclass(frozen=True)
class BinCounts:
    """Rows of one bin. `last_row_tokens`: of its emptiest row, which is the last."""

    rows: int
    documents: int
    tokens: int
    labels: int
    last_row_tokens: int


@dataclass(frozen=True)
class HeldOutCounts:
    """What `--held_out_share` keeps out of training; `parts` by number of the input directory."""

    share: float
    documents: DocumentCounts
    parts: Mapping[int, BinCounts]

    def as_json(self) -> dict[str, Any]:
        total = self.documents.total
        assert total.tokens_out == sum(part.tokens for part in self.parts.values())
        return {
            "share": self.share,
            "total": total.as_json(),
            **self.documents.as_json(),
            "parts": [
                {"input_dir": number, "rows": part.rows, "pieces": part.documents, "tokens": part.tokens}
                for number, part in sorted(self.parts.items())
            ],
        }


def make_statistics(
    settings: Mapping[str, Any],
    documents: DocumentCounts,
    bad_records: Mapping[str, int],
    bins: list[BinCounts],
    max_length: int,
    piece_lengths: np.ndarray,
    held_out: HeldOutCounts | None = None,
    new_pieces: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `stats.json`: no times, paths or worker counts, so equal data gives an equal file.

    Args:
        settings: the choices that are written down.
        documents: of those for training, and of those that are dropped.
        held_out: None without `--held_out_share`.
        new_pieces: how often they occur; None where the vocabulary was not extended.
    """
    total = documents.total
    num_held_out = held_out.documents.total.documents if held_out else 0
    num_bad = sum(bad_records.values())
    num_rows = sum(b.rows for b in bins)
    num_tokens = sum(b.tokens for b in bins)
    assert num_tokens == total.tokens_out
    return {
        "format": 1,
        **settings,
        "records": {
            "read": total.documents + num_bad + num_held_out,
            "kept": total.kept,
            **({"held_out": num_held_out} if held_out else {}),
            "dropped": {**dict(sorted(total.dropped_documents.items())), **dict(sorted(bad_records.items()))},
        },
        "total": total.as_json(),
        "rows": {
            "rows": num_rows,
            "tokens": num_tokens,
            "labels": sum(b.labels for b in bins),
            "fill": _ratio(num_tokens, num_rows * max_length),
            "fill_without_last_rows": _ratio(
                num_tokens - sum(b.last_row_tokens for b in bins), (num_rows - len(bins)) * max_length
            ),
        },
        **documents.as_json(),
        "bins": [{"rows": b.rows, "pieces": b.documents, "tokens": b.tokens} for b in bins],
        "piece_lengths": _histogram(piece_lengths),
        **({"held_out": held_out.as_json()} if held_out else {}),
        **({"new_pieces": dict(new_pieces)} if new_pieces is not None else {}),
    }


def format_statistics(stats: Mapping[str, Any]) -> str:
    """The table at the end of a run: a line for each category, then the sum."""
    by_size = sorted(stats["categories"].items(), key=lambda item: (-item[1]["tokens_in"], item[0]))
    shown = [(name, counts) for name, counts in by_size[:MAX_CATEGORIES_IN_TABLE]]
    header = [
        "category",
        "documents",
        "characters",
        "tokens",
        "tokens/char",
        "dropped docs",
        "dropped tokens",
    ]
    lines = [
        [
            name,
            counts["documents"],
            counts["characters"],
            counts["tokens_in"],
            counts["tokens_per_character"] or 0.0,
            sum(counts["dropped_documents"].values()),
            sum(counts["dropped_tokens"].values()),
        ]
        for name, counts in [*shown, ("all", stats["total"])]
    ]
    parts = [format_table(header, lines)]
    if len(by_size) > len(shown):
        parts.append(f"({len(by_size) - len(shown)} smaller categories are in stats.json)")
    for title, reasons in (
        ("Records dropped", stats["records"]["dropped"]),
        ("Tokens dropped", stats["total"]["dropped_tokens"]),
        ("Noted", stats["total"]["notes"]),
    ):
        if reasons:
            parts.append(f"{title}: " + ", ".join(f"{name} {number:,}" for name, number in reasons.items()))
    if held_out := stats.get("held_out"):
        counts = held_out["total"]
        parts.append(f"Held out: {counts['documents']:,} documents, {counts['tokens_out']:,} tokens")
    if new := stats.get("new_pieces"):
        parts.append(
            f"New pieces: {new['pieces']:,}, of which {new['never']:,} never occur, "
            + ", ".join(f"{new[f'under_{limit}']:,} under {limit} times" for limit in RARE_LIMITS)
        )
    rows = stats["rows"]
    fill = f"{100 * rows['fill']:.2f} % full"
    if rows["fill_without_last_rows"] is not None:
        fill += f" ({100 * rows['fill_without_last_rows']:.2f} % without each bin's last row)"
    parts.append(
        f"{stats['num_bins']:,} bins, {rows['rows']:,} rows of at most {stats['max_length']:,} tokens, "
        f"{rows['tokens']:,} tokens, {rows['labels']:,} with loss; rows are {fill}"
    )
    return "\n".join(parts)


def prepare_to_draw() -> None:
    """Loads matplotlib and its fonts, which takes longer than the drawing does."""
    histogram = _histogram(np.zeros(0, dtype=np.int64))
    draw_lengths(
        {"piece_lengths": histogram, "total": {"pieces": 0}, "rows": {"tokens": 0}}, path=io.BytesIO()
    )


def draw_lengths(stats: Mapping[str, Any], path: Path | BinaryIO) -> None:
    """Writes a histogram of the lengths of documents (chunks of long ones count by themselves) as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    histogram = stats["piece_lengths"]
    edges, numbers = histogram["edges"], histogram["counts"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed, and no state of pyplot's is touched
    axes = figure.add_subplot()
    axes.bar(edges[:-1], numbers, width=np.diff(edges), align="edge", edgecolor="white", linewidth=0.5)
    axes.set_xlabel("length, in tokens")
    axes.set_ylabel("documents and chunks")
    axes.set_title(f"{stats['total']['pieces']:,} documents and chunks, {stats['rows']['tokens']:,} tokens")
    axes.set_xlim(0, edges[-1])
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


def _histogram(lengths: np.ndarray, num_bars: int = 50) -> dict[str, Any]:
    longest = int(lengths.max()) if len(lengths) else 1
    width = -(-longest // num_bars)
    edges = np.arange(0, longest + width, width)
    counts, _ = np.histogram(lengths, bins=np.append(edges[:-1], edges[-1]))
    return {
        "shortest": int(lengths.min()) if len(lengths) else 0,
        "longest": longest,
        "mean": round(float(lengths.mean()), 3) if len(lengths) else 0.0,
        "median": float(np.median(lengths)) if len(lengths) else 0.0,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
    }


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None
