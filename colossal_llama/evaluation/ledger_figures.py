"""The figures of each new piece: how it fares on held-out text, how far its rows moved, how often it occurs.

A new piece is compared with the tokens that it replaces, in the same text and under the base model:

    text                 我 在 图 书 馆 看 书
    extended model       …  …  [图书馆 1.9 nats]  …
    base model           …  …  [图 2.8][书 1.1][馆 0.4] …     4.3 nats: the piece saves 2.4

Only where the base has a border of tokens at both ends of the piece: elsewhere its tokens are not these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama.dataset.piece_counts import summarise_counts

if TYPE_CHECKING:
    import torch

# Fewer occurrences than this in held-out text say little about a piece: it is in no table.
MIN_OCCURRENCES = 3
# Rows that moved by less than this share of their length are as they were made.
HARDLY_MOVED = 0.01
# Rows that are measured at once, in float64.
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ScoredDocument:
    """A document under one model.

    Attributes:
        ids: its tokens that count, without EOS.
        starts, ends: where each begins and ends, in bytes of the text.
        losses: of each, in nats.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    losses: np.ndarray


@dataclass
class PieceScore:
    """A new piece on held-out text.

    Attributes:
        occurrences: times that it counts.
        compared: of these, where the base has borders at both ends.
        nats, base_nats: summed over those: of the piece, and of the base's tokens in its place.
        base_tokens: number of those.
    """

    occurrences: int = 0
    compared: int = 0
    nats: float = 0.0
    base_nats: float = 0.0
    base_tokens: int = 0


def score_pieces(
    base: Sequence[ScoredDocument], extended: Sequence[ScoredDocument], new_ids: Sequence[int]
) -> dict[int, PieceScore]:
    """The scores of all new pieces that occur, by id; both lists are of the same documents."""
    wanted = np.array(sorted(new_ids), dtype=np.int64)
    scores: dict[int, PieceScore] = {}
    for base_document, document in zip(base, extended, strict=True):
        found = np.flatnonzero(np.isin(document.ids, wanted))
        if not len(found):
            continue
        sums = np.concatenate([[0.0], np.cumsum(base_document.losses)])
        # The base's tokens from `first` to before `last` end inside the piece.
        firsts = np.searchsorted(base_document.ends, document.starts[found], side="right")
        lasts = np.searchsorted(base_document.ends, document.ends[found], side="right")
        for index, first, last in zip(found.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            score = scores.setdefault(int(document.ids[index]), PieceScore())
            score.occurrences += 1
            start, end = document.starts[index], document.ends[index]
            if last == first or base_document.starts[first] != start or base_document.ends[last - 1] != end:
                continue
            score.compared += 1
            score.nats += float(document.losses[index])
            score.base_nats += float(sums[last] - sums[first])
            score.base_tokens += last - first
    return scores


@dataclass(frozen=True)
class RowMovement:
    """How far one row of a matrix moved from where it started."""

    norm: float
    start_norm: float
    distance: float
    cosine: float

    @property
    def relative(self) -> float:
        """The distance, as a share of the row's first length."""
        return self.distance / self.start_norm if self.start_norm else float(self.distance > 0)


def measure_movement(start: torch.Tensor, rows: torch.Tensor) -> list[RowMovement]:
    """For each row of two matrices of one shape."""
    return [
        movement
        for parts in zip(start.split(ROWS_AT_ONCE), rows.split(ROWS_AT_ONCE), strict=True)
        for movement in _measure_rows(parts[0].double(), parts[1].double())
    ]


def _measure_rows(start: torch.Tensor, rows: torch.Tensor) -> list[RowMovement]:
    norms, start_norms = rows.norm(dim=1), start.norm(dim=1)
    distances = (rows - start).norm(dim=1)
    lengths = norms * start_norms
    cosines = (rows * start).sum(1) / lengths.where(lengths > 0, 1.0)
    return [
        RowMovement(*values)
        for values in zip(
            norms.tolist(), start_norms.tolist(), distances.tolist(), cosines.tolist(), strict=True
        )
    ]


def is_hardly_moved(input_row: RowMovement, output_row: RowMovement | None) -> bool:
    return max(row.relative for row in (input_row, output_row) if row is not None) < HARDLY_MOVED


@dataclass(frozen=True)
class LedgerEntry:
    """Everything about one new piece.

    Attributes:
        data_occurrences: in the training data; None where they are not known.
        input_row, output_row: None for the output row of a model whose matrices are tied.
        score: on held-out text; None where it does not occur there.
    """

    id: int
    piece: str
    data_occurrences: int | None
    input_row: RowMovement
    output_row: RowMovement | None
    score: PieceScore | None

    @property
    def saved_nats(self) -> float | None:
        """What an occurrence saves against the base's tokens; below zero it costs."""
        if self.score is None or not self.score.compared:
            return None
        return (self.score.base_nats - self.score.nats) / self.score.compared

    @property
    def hardly_moved(self) -> bool:
        return is_hardly_moved(self.input_row, self.output_row)

    def as_json(self) -> dict[str, Any]:
        score = self.score or PieceScore()
        compared = score.compared or None
        return {
            "id": self.id,
            "piece": self.piece,
            "data_occurrences": self.data_occurrences,
            "input_row": _movement_json(self.input_row),
            "output_row": self.output_row and _movement_json(self.output_row),
            "held_out_occurrences": score.occurrences,
            "compared": score.compared,
            "mean_nats": compared and score.nats / compared,
            "mean_nats_of_base": compared and score.base_nats / compared,
            "mean_tokens_of_base": compared and score.base_tokens / compared,
            "saved_nats": self.saved_nats,
        }


def _movement_json(movement: RowMovement) -> dict[str, float]:
    return {**asdict(movement), "relative": movement.relative}


def make_ledger(
    pieces: Mapping[int, str],
    data_counts: np.ndarray | None,
    input_rows: Sequence[RowMovement],
    output_rows: Sequence[RowMovement] | None,
    scores: Mapping[int, PieceScore],
) -> list[LedgerEntry]:
    """The entries in the order of `pieces` (id -> piece), which all other lists have too."""
    return [
        LedgerEntry(
            token_id,
            piece,
            None if data_counts is None else int(data_counts[number]),
            input_rows[number],
            None if output_rows is None else output_rows[number],
            scores.get(token_id),
        )
        for number, (token_id, piece) in enumerate(pieces.items())
    ]


def summarise(ledger: Sequence[LedgerEntry]) -> dict[str, Any]:
    """All entries together."""
    counts = [entry.data_occurrences for entry in ledger]
    known = np.array([count for count in counts if count is not None], dtype=np.int64)
    scored = [entry for entry in ledger if entry.score is not None and entry.score.compared]
    saved = sum(entry.score.base_nats - entry.score.nats for entry in scored if entry.score)
    worse = [entry for entry in scored if (entry.saved_nats or 0.0) < 0]
    return {
        "pieces": len(ledger),
        "in_data": summarise_counts(known) if len(known) == len(ledger) else None,
        "never_in_held_out_text": sum(entry.score is None for entry in ledger),
        "compared": len(scored),
        "worse_than_the_base": len(worse),
        "saved_nats": float(saved),
        "hardly_moved": sum(entry.hardly_moved for entry in ledger),
        "median_input_cosine": _median([entry.input_row.cosine for entry in ledger]),
        "median_output_cosine": _median([entry.output_row.cosine for entry in ledger if entry.output_row]),
    }


def _median(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def rank(ledger: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Entries with enough occurrences, what costs most against the base first."""
    enough = [entry for entry in ledger if entry.score and entry.score.compared >= MIN_OCCURRENCES]
    return sorted(enough, key=lambda entry: (entry.saved_nats, entry.id))


def make_markdown(ledger: Sequence[LedgerEntry], num_shown: int) -> str:
    """The summary, and tables of the worst and the best."""
    facts = summarise(ledger)
    ranked = rank(ledger)
    num_shown = min(num_shown, (len(ranked) + 1) // 2)
    parts = [
        "# Ledger of new rows",
        "Nats of a piece are the model's loss on it, those of the base the summed loss of the tokens that it "
        "replaces, on the same held-out text. Saved: the difference for an occurrence; below zero, the base "
        f"does better. Pieces compared fewer than {MIN_OCCURRENCES} times are left out of the tables. Moved: "
        "distance from the start as a share of the row's length then; cosine 1 is the direction that it had.",
        _summary_table(facts),
    ]
    if ranked:
        parts += ["## The worst", _entries_table(ranked[:num_shown])]
        parts += ["## The best", _entries_table(ranked[::-1][:num_shown])]
    return "\n\n".join(parts) + "\n"


def _summary_table(facts: Mapping[str, Any]) -> str:
    in_data = facts["in_data"]
    rows = [("new pieces", f"{facts['pieces']:,}")]
    if in_data is None:
        rows.append(("occurrences in the training data", "not known"))
    else:
        rows += [
            ("occurrences in the training data", f"{in_data['occurrences']:,}"),
            ("never there", f"{in_data['never']:,}"),
            ("under 10 times", f"{in_data['under_10']:,}"),
            ("under 100 times", f"{in_data['under_100']:,}"),
        ]
    rows += [
        ("never in the held-out text", f"{facts['never_in_held_out_text']:,}"),
        ("compared with the base's tokens", f"{facts['compared']:,}"),
        ("of them worse than the base", f"{facts['worse_than_the_base']:,}"),
        ("nats saved by all together", f"{facts['saved_nats']:,.1f}"),
        (f"rows that moved by less than {HARDLY_MOVED:.0%}", f"{facts['hardly_moved']:,}"),
    ]
    for name in ("input", "output"):
        if (cosine := facts[f"median_{name}_cosine"]) is not None:
            rows.append((f"median cosine of {name} rows to their start", f"{cosine:.4f}"))
    return "\n".join(["| all pieces | |", "| --- | ---: |", *(f"| {a} | {b} |" for a, b in rows)])


def _entries_table(entries: Sequence[LedgerEntry]) -> str:
    header = ["piece", "id", "in data", "held out", "nats", "base's nats", "saved", "input moved", "cosine"]
    header += ["output moved", "cosine"]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    for entry in entries:
        score = entry.score
        assert score is not None
        cells = [
            f"`{entry.piece.replace('|', chr(92) + '|').replace('`', chr(39))}`",
            str(entry.id),
            "" if entry.data_occurrences is None else f"{entry.data_occurrences:,}",
            f"{score.occurrences:,}",
            f"{score.nats / score.compared:.3f}",
            f"{score.base_nats / score.compared:.3f}",
            f"{entry.saved_nats:+.3f}",
        ]
        for row in (entry.input_row, entry.output_row):
            cells += ["", ""] if row is None else [f"{row.relative:.1%}", f"{row.cosine:.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
