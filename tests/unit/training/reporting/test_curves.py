"""The curves' numbers, and that the picture holds what they say."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from colossal_llama.training.reporting.curves import (
    draw_curves,
    join_stages,
    make_curve,
    shorten,
    shorten_rate,
    smooth,
)


def make_records(num_steps: int, tokens_per_step: int, eval_every: int = 0) -> list[dict]:
    records = []
    for step in range(1, num_steps + 1):
        record = {"step": step, "tokens": step * tokens_per_step, "loss": 6 - step / num_steps, "lr": 1e-4}
        if eval_every and step % eval_every == 0:
            record["eval_loss"] = record["loss"] + 0.1
        records.append(record)
    return records


def test_a_stage_begins_where_the_one_before_ended() -> None:
    first, second, third = join_stages([make_records(4, 10), make_records(2, 100, 2), make_records(1, 7)])
    assert (first.steps, first.tokens) == ([1, 2, 3, 4], [10, 20, 30, 40])
    assert (second.steps, second.tokens) == ([5, 6], [140, 240])
    assert (second.eval_steps, second.eval_tokens, second.eval_losses) == ([6], [240], [5.1])
    assert (third.steps, third.tokens) == ([7], [247])


def evaluate_sets(records: list[dict], **values: float) -> list[dict]:
    """Adds an evaluation of sets to each record, and one before the first step."""
    start = {"step": 0, "epoch": 0, "tokens": 0}
    figures = {f"eval_bits_per_byte/{name}": value for name, value in values.items()}
    figures |= {"eval_loss": 5.0, "eval_bits_per_byte": sum(values.values()) / len(values)}
    return [{**record, **figures} for record in (start, *records)]


def test_each_held_out_set_has_a_curve_from_the_start_of_each_stage() -> None:
    first = evaluate_sets(make_records(2, 10), zh=2.0, en=1.0)
    second = evaluate_sets(make_records(1, 10), zh=1.5)
    curves = join_stages([first, second])
    assert curves[0].bits_per_byte == {
        "zh": ([0, 1, 2], [2.0] * 3),
        "en": ([0, 1, 2], [1.0] * 3),
        "all sets": ([0, 1, 2], [1.5] * 3),
    }
    assert curves[1].bits_per_byte == {"zh": ([2, 3], [1.5] * 2), "all sets": ([2, 3], [1.5] * 2)}
    assert (curves[0].steps, curves[1].steps) == ([1, 2], [3])
    assert (curves[0].eval_steps, curves[1].eval_steps) == ([0, 1, 2], [2, 3])


def test_smoothing_follows_without_lag() -> None:
    values = np.linspace(5, 3, 600)
    noise = np.random.default_rng(0).normal(0, 0.1, 600)
    smoothed = np.array(smooth((values + noise).tolist()))
    inside = slice(30, -30)
    assert np.abs(smoothed - values)[inside].max() < 0.1
    assert np.abs((smoothed - values)[inside].mean()) < 0.01
    assert smoothed.std() < (values + noise).std()
    assert smooth([3.0] * 100) == pytest.approx([3.0] * 100)


def test_short_runs_are_not_smoothed() -> None:
    assert make_curve(make_records(3, 10)).smoothed == make_curve(make_records(3, 10)).losses


@pytest.mark.parametrize(
    ("number", "least", "text"),
    [(0, 1e3, "0"), (1500, 1e5, "1,500"), (1500, 1e3, "1.5k"), (2.5e6, 1e5, "2.5M"), (8.5e9, 1e3, "8.5B")],
)
def test_ticks(number: float, least: float, text: str) -> None:
    assert shorten(number, least) == text


def test_ticks_of_learning_rates() -> None:
    assert [shorten_rate(rate) for rate in (0, 3e-4, 2.5e-5)] == ["0", "3e-4", "2.5e-5"]


def write_metrics(directory: Path, stages: list[list[dict]]) -> None:
    directory.mkdir()
    for name, records in (
        ("earlier_stages.jsonl", [{**r, "stage": n} for n, stage in enumerate(stages[:-1]) for r in stage]),
        ("metrics.jsonl", stages[-1]),
    ):
        (directory / name).write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def count_coloured(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture[..., :3] - np.array(colour) / 255).max(axis=-1) < 0.02).sum())


def test_the_picture(tmp_path: Path) -> None:
    """A row of panels for the run, a second one when it has earlier stages; orange only where evaluated."""
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    heights = []
    for name, stages in (
        ("one", [make_records(50, 1000)]),
        ("evaluated", [make_records(50, 1000, 10)]),
        ("stages", [make_records(50, 1000, 10), make_records(30, 2000, 10)]),
        ("single step", [make_records(1, 1000)]),
    ):
        write_metrics(tmp_path / name, stages)
        assert draw_curves(tmp_path / name) == tmp_path / name / "training_curves.png"
        picture = matplotlib.image.imread(tmp_path / name / "training_curves.png")
        heights.append(picture.shape[0])
        assert count_coloured(picture, blue) > 10
        assert count_coloured(picture, green) > 10
        assert (count_coloured(picture, orange) > 0) == (name in ("evaluated", "stages"))
    assert heights == [heights[0], heights[0], 2 * heights[0], heights[0]]


def test_old_and_new_language_share_a_panel(tmp_path: Path) -> None:
    red, purple, grey = (214, 39, 40), (148, 103, 189), (127, 127, 127)
    stages = [evaluate_sets(make_records(30, 1000), zh=2.0, en=1.0) for _ in range(2)]
    write_metrics(tmp_path / "plain", [make_records(30, 1000, 10)])
    write_metrics(tmp_path / "sets", stages)
    one_set = [{**record, "eval_loss": 5.0, "eval_bits_per_byte": 2.0} for record in make_records(30, 1000)]
    write_metrics(tmp_path / "one set", [one_set])
    pictures = []
    for name in ("plain", "sets", "one set"):
        draw_curves(tmp_path / name)
        pictures.append(matplotlib.image.imread(tmp_path / name / "training_curves.png"))
    assert [picture.shape[1] / pictures[0].shape[1] for picture in pictures] == pytest.approx(
        [1, 4 / 3, 4 / 3], abs=0.01
    )
    assert [count_coloured(picture, red) > 10 for picture in pictures] == [False, True, True]
    assert [count_coloured(picture, purple) > 10 for picture in pictures] == [False, True, False]
    assert count_coloured(pictures[1], grey) > 10


def test_no_picture_without_metrics(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
