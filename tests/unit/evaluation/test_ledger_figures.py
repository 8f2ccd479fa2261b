"""The figures of new pieces, by hand and against a count byte by byte."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.evaluation.ledger_figures import (
    LedgerEntry,
    PieceScore,
    RowMovement,
    ScoredDocument,
    make_ledger,
    make_markdown,
    measure_movement,
    rank,
    score_pieces,
    summarise,
)

STILL = RowMovement(1.0, 1.0, 0.0, 1.0)


def document(tokens: list[tuple[int, int]], first: int = 0) -> ScoredDocument:
    """Of (id, bytes) of each token from byte `first` on; the loss of token i is 2 ** i."""
    ends = first + np.cumsum([size for _, size in tokens])
    starts = np.concatenate([[first], ends[:-1]]) if tokens else np.zeros(0)
    losses = 2.0 ** np.arange(len(tokens))
    return ScoredDocument(np.array([i for i, _ in tokens], dtype=np.int32), starts, ends, losses)


def test_a_piece_against_its_tokens() -> None:
    base = document([(1, 1), (2, 2), (3, 1), (4, 1)])
    extended = document([(1, 1), (90, 3), (4, 1)])
    (score,) = score_pieces([base], [extended], [90, 91]).values()
    assert score == PieceScore(occurrences=1, compared=1, nats=2.0, base_nats=2.0 + 4.0, base_tokens=2)


def test_a_token_across_a_border_of_the_piece_is_not_compared() -> None:
    extended = document([(1, 1), (90, 3), (4, 1)])
    for tokens in ([(1, 1), (2, 2), (3, 2)], [(5, 2), (2, 2), (4, 1)], [(9, 5)]):
        (score,) = score_pieces([document(tokens)], [extended], [90]).values()
        assert (score.occurrences, score.compared) == (1, 0)
    # Behind a source, where the base's first token begins before what counts.
    base, extended = document([(1, 4)], first=3), document([(90, 3)], first=4)
    assert score_pieces([base], [extended], [90])[90].compared == 0


sizes = st.lists(st.integers(0, 4), max_size=12)


@settings(max_examples=300)
@given(sizes, sizes, st.data())
def test_every_occurrence_is_compared_where_borders_meet(
    base_sizes: list[int], sizes: list[int], data: st.DataObject
) -> None:
    length = max(sum(base_sizes), sum(sizes))
    base = document([(1, size) for size in [*base_sizes, length - sum(base_sizes)]])
    ids = data.draw(st.lists(st.sampled_from([1, 90, 91]), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    # A new piece has bytes.
    tokens = [(i if size else 1, size) for i, size in zip(ids, [*sizes, length - sum(sizes)], strict=True)]
    extended = document(tokens)
    wanted: dict[int, PieceScore] = {}
    for token, start, end, loss in zip(
        extended.ids, extended.starts, extended.ends, extended.losses, strict=True
    ):
        if token == 1:
            continue
        score = wanted.setdefault(int(token), PieceScore())
        score.occurrences += 1
        inside = [i for i in range(len(base.ids)) if start < base.ends[i] <= end]
        if inside and base.starts[inside[0]] == start and base.ends[inside[-1]] == end:
            score.compared += 1
            score.nats += loss
            score.base_nats += sum(base.losses[inside])
            score.base_tokens += len(inside)
    assert score_pieces([base], [extended], [90, 91]) == wanted


def test_movement() -> None:
    start = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    rows = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.bfloat16)
    doubled, turned, empty = measure_movement(start, rows)
    assert doubled == RowMovement(10.0, 5.0, 5.0, 1.0)
    assert (turned.relative, turned.cosine) == (pytest.approx(math.sqrt(2)), 0.0)
    assert (empty.relative, empty.cosine) == (0.0, 0.0)


def entry(token_id: int, nats: float, base_nats: float, compared: int, count: int | None) -> LedgerEntry:
    score = PieceScore(compared + 1, compared, nats * compared, base_nats * compared, 2 * compared)
    return LedgerEntry(token_id, f"p|{token_id}", count, STILL, STILL, score)


def test_ranks_and_sums() -> None:
    ledger = [
        entry(10, 4.0, 3.0, 5, 0),
        entry(11, 1.0, 3.0, 5, 50),
        entry(12, 1.0, 9.0, 2, 500),  # too few to tell
        LedgerEntry(13, "never", 9, STILL, None, None),
    ]
    assert [each.id for each in rank(ledger)] == [10, 11]
    facts = summarise(ledger)
    assert facts["in_data"] == {
        "pieces": 4,
        "occurrences": 559,
        "never": 1,
        "under_10": 2,
        "under_100": 3,
    }
    assert (facts["compared"], facts["worse_than_the_base"], facts["never_in_held_out_text"]) == (3, 1, 1)
    assert facts["saved_nats"] == pytest.approx(-5 + 10 + 16)
    assert facts["hardly_moved"] == 4
    text = make_markdown(ledger, 20)
    worst, best = text.split("## The worst")[1].split("## The best")
    assert "`p\\|10`" in worst
    assert "-1.000" in worst
    assert "`p\\|11`" in best
    assert "+2.000" in best
    assert "not known" in make_markdown([entry(10, 1.0, 1.0, 1, None)], 20)


def test_json_of_an_entry() -> None:
    (one,) = make_ledger({7: "x"}, np.array([3]), [STILL], None, {})
    value = one.as_json()
    assert value["data_occurrences"] == 3
    assert value["output_row"] is None
    assert value["mean_nats"] is value["saved_nats"] is None
    assert value["held_out_occurrences"] == 0
    value = entry(10, 4.0, 3.0, 5, None).as_json()
    assert (value["mean_nats"], value["mean_nats_of_base"], value["saved_nats"]) == (4.0, 3.0, -1.0)
    assert value["mean_tokens_of_base"] == 2
