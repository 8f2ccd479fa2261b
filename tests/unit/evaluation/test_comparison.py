"""Figures of a comparison, from losses of documents."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colossal_llama.evaluation.comparison import (
    ModelScores,
    bootstrap_intervals,
    compare,
    costs_of_new_rows,
    group_documents,
)
from colossal_llama.evaluation.held_out_text import Document

DOCUMENTS = [
    Document("zh", "web", "", "人工智能"),
    Document("en", "web", "", "a river"),
    Document("zh", "news", "长江", "很长"),
    Document("zh", "web", "", "A"),
]


def make_scores(name: str, losses: list[float], costs: list[float] | None = None) -> ModelScores:
    return ModelScores(
        name,
        np.array(losses),
        None if costs is None else np.array(costs),
        np.array([4, 3, 4, 1]),
        num_new_rows=10,
        num_used_rows=2,
    )


def test_groups_are_sets_and_their_categories() -> None:
    groups = [(group.set, group.category, group.documents.tolist()) for group in group_documents(DOCUMENTS)]
    assert groups == [
        ("zh", None, [0, 2, 3]),
        ("zh", "news", [2]),
        ("zh", "web", [0, 3]),
        ("en", None, [1]),
        ("en", "web", [1]),
    ]


def test_results() -> None:
    base = make_scores("base", [8.0, 7.0, 6.0, 1.0])
    trained = make_scores("trained", [4.0, 7.5, 5.0, 1.0], [0.5, 0.0, 0.25, 0.0])
    results = {(r.model, r.set, r.category): r for r in compare(DOCUMENTS, [base, trained, base])}
    found = results["trained", "zh", None]
    assert (found.documents, found.bytes) == (3, 12 + 6 + 1)
    assert found.bits_per_byte == pytest.approx(10 / 19 / math.log(2))
    assert found.change == pytest.approx(-5 / 19 / math.log(2))
    assert found.tokens_per_character == 9 / 9
    assert found.interval is not None
    assert found.interval[0] <= found.change <= found.interval[1] <= 0
    assert results["trained", "en", None].change == pytest.approx(0.5 / 7 / math.log(2))
    assert results["trained", "en", None].interval is None
    costs = costs_of_new_rows(DOCUMENTS, [base, trained])
    assert {cost.model for cost in costs} == {"trained"}
    assert costs[0].cost_of_new_rows == pytest.approx(0.75 / 19 / math.log(2))


def test_a_model_against_itself_changes_nothing() -> None:
    losses = np.random.default_rng(0).gamma(2, 50, 4).tolist()
    for result in compare(DOCUMENTS, [make_scores("base", losses), make_scores("same", losses)]):
        assert result.change == 0.0
        assert result.interval in (None, (0.0, 0.0))


def test_intervals_are_those_of_resampled_documents() -> None:
    """Against plain resampling, document by document."""
    generator = np.random.default_rng(5)
    num_bytes = generator.integers(50, 5000, 80).astype(float)
    differences = np.stack([num_bytes * generator.normal(mean, 0.2, 80) for mean in (-0.1, 0.0)])
    intervals = bootstrap_intervals(differences, num_bytes)
    for difference, interval in zip(differences, intervals, strict=True):
        changes = []
        for _ in range(4000):
            picked = generator.integers(0, 80, 80)
            changes.append(difference[picked].sum() / num_bytes[picked].sum() / math.log(2))
        width = np.subtract(*np.percentile(changes, [97.5, 2.5]))
        assert interval is not None
        assert interval == pytest.approx(np.percentile(changes, [2.5, 97.5]), abs=0.12 * width)
    assert bootstrap_intervals(differences, num_bytes) == intervals


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """300 held-out sets of 60 documents, drawn from a population whose change is known."""
    generator = np.random.default_rng(6)
    inside = 0
    for _ in range(300):
        num_bytes = generator.integers(50, 3000, 60).astype(float)
        difference = num_bytes * generator.normal(-0.05, 0.1, 60)
        (interval,) = bootstrap_intervals(difference[None], num_bytes)
        assert interval is not None
        inside += interval[0] <= -0.05 / math.log(2) <= interval[1]
    assert 0.90 <= inside / 300 <= 0.985
