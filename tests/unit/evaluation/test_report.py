"""The tables and the picture of a comparison."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np

from colossal_llama.evaluation.comparison import ModelScores, compare, costs_of_new_rows
from colossal_llama.evaluation.held_out_text import Document
from colossal_llama.evaluation.report import draw_comparison, make_markdown
from colossal_llama.evaluation.standing_rows import MEANS, NewRowsReport

DOCUMENTS = [
    *(Document("zh|1", category, "", "人" * 10) for category in "ab" for _ in range(20)),
    *(Document("en", "web", "", "river" * 6) for _ in range(5)),
]

NEW_ROWS = [
    NewRowsReport("made", 9, list("abcdef"), "made"),
    NewRowsReport("run/step-5", 9, ["a|b"], "made", [], 0.5, None),
    NewRowsReport("other", 9, [], MEANS, ["中"], 1.0, 0.25),
    NewRowsReport("unknown", 9, []),
]


def make_scores() -> list[ModelScores]:
    num_tokens = np.full(len(DOCUMENTS), 12)
    losses = np.full(len(DOCUMENTS), 30 * np.log(2))
    better = losses * np.where(np.arange(len(DOCUMENTS)) < 40, 0.5, 1.0)
    return [
        ModelScores("base", losses, None, num_tokens),
        ModelScores("run/step-5", better, 0.1 * losses, num_tokens // 2, 40, 30),
        ModelScores("same", losses, None, num_tokens),
    ]


def make_text(scores: list[ModelScores]) -> str:
    results, costs = compare(DOCUMENTS, scores), costs_of_new_rows(DOCUMENTS, scores)
    return make_markdown(results, costs, NEW_ROWS, scores, 8192, 4096)


def test_tables() -> None:
    lines = make_text(make_scores()).splitlines()
    gain, same = "**0.5000** (-0.5000; -0.5000 to -0.5000)", "1.0000 (+0.0000; +0.0000 to +0.0000)"
    for line in (
        "| set | category | documents | `base` | `run/step-5` | `same` |",
        f"| `zh\\|1` | all | 40 | 1.0000 | {gain} | {same} |",
        f"| `zh\\|1` | `a` | 20 | 1.0000 | {gain} | {same} |",
        f"| `en` | all | 5 | 1.0000 | {same} | {same} |",  # one category, and no best among equals
        "| `zh\\|1` | all | 1.2000 | 0.6000 | 1.2000 |",
        "| set | category | `run/step-5` |",
        "| `en` | all | 0.1000 |",
        "- `run/step-5`: 30 of 40 new rows occur in this text",
        "| `made` | `made` | 9 | 6: `a`, `b`, `c`, `d`, `e`, … | is the start |  |  |",
        "| `run/step-5` | `made` | 9 | 1: `a\\|b` | 0 | 0.5000 |  |",
        "| `other` | means of the base's rows | 9 | 0 | 1: `中` | 1.0000 | 0.2500 |",
        "| `unknown` | not known | 9 | 0 |  |  |  |",
        "Sets of fewer than 30 documents, whose intervals are rough: `en`",
        "Context 8,192 bytes, stride 4,096 bytes.",
    ):
        assert line in lines
    assert len({line.count("|") - line.count("\\|") for line in lines if line.startswith("| `zh")}) == 3


def test_one_model_alone() -> None:
    text = make_text(make_scores()[:1])
    assert "| `en` | all | 5 | 1.0000 |" in text.splitlines()
    assert "Cost of new rows" not in text


def test_the_picture(tmp_path: Path) -> None:
    scores = make_scores()
    for models, is_wide in ((scores, True), (scores[:1], False)):
        draw_comparison(compare(DOCUMENTS, models), [model.name for model in models], tmp_path / "x.png")
        picture = matplotlib.image.imread(tmp_path / "x.png")
        height, width = picture.shape[:2]
        assert (width > 1.5 * height) == is_wide
        for colour in ((31, 119, 180), (214, 39, 40)):  # one for each set
            assert (np.abs(picture[..., :3] - np.array(colour) / 255).max(axis=-1) < 0.02).sum() > 20
