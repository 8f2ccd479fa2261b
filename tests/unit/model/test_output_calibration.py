"""Biases of new output rows against what they must be, and what the formulas say written again."""

from __future__ import annotations

import math

import pytest
import torch

from colossal_llama.model.output_calibration import (
    NUM_ITERATIONS,
    calibrate,
    mean_direction,
    normalizers,
    smooth_frequencies,
)


def test_frequencies_are_smoothed() -> None:
    found = smooth_frequencies(torch.tensor([0, 3, 7]), 100)
    assert found.tolist() == pytest.approx([0.5 / 101.5, 3.5 / 101.5, 7.5 / 101.5], rel=1e-12)


def test_the_direction_adds_one_at_the_mean() -> None:
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + 3
    assert float(hidden.mean(0) @ mean_direction(hidden)) == pytest.approx(1, abs=1e-5)


def test_biases_that_are_known_in_closed_form() -> None:
    """All positions have the same state: b = log p - log(1 - Σp) + Z - logit makes the softmax give p."""
    torch.manual_seed(0)
    state, old, new = torch.randn(12) + 2, torch.randn(30, 12) * 0.2, torch.randn(4, 12) * 0.2
    hidden = state.repeat(9, 1)
    expected = torch.tensor([0.002, 0.05, 0.01, 0.0001], dtype=torch.float64)
    found = calibrate(hidden, new, normalizers(hidden, old), expected)
    old_normalizer = (old.double() @ state.double()).logsumexp(0)
    exact = expected.log() - torch.log(1 - expected.sum()) + old_normalizer - new.double() @ state.double()
    torch.testing.assert_close(found.biases.double(), exact, atol=1e-3, rtol=0)
    torch.testing.assert_close(found.reached, expected, atol=0, rtol=1e-3)
    shifted = new + found.biases[:, None] * found.direction
    probabilities = torch.softmax(torch.cat([old, shifted]).double() @ state.double(), 0)[30:]
    torch.testing.assert_close(probabilities, expected, atol=0, rtol=2e-3)


def test_each_iteration_is_the_one_of_the_formula() -> None:
    """b += clamp(log(T p) - log Σ_t P(piece | h_t), ±3), over states that differ; more than one chunk."""
    torch.manual_seed(1)
    hidden, old, new = torch.randn(40, 8) + 1.5, torch.randn(20, 8), torch.randn(6, 8)
    expected = torch.tensor([1e-7, 0.001, 0.02, 0.1, 0.0004, 0.3], dtype=torch.float64)
    seen: list[int] = []
    found = calibrate(hidden, new, normalizers(hidden, old), expected, seen.append)
    scale = hidden.double() @ found.direction.double()
    biases = torch.zeros(6, dtype=torch.float64)
    for _ in range(NUM_ITERATIONS):
        logits = torch.cat([old, new]).double() @ hidden.double().T
        logits[20:] += biases[:, None] * scale
        mean = torch.softmax(logits, 0)[20:].mean(1)
        biases += (expected.log() - mean.log()).clamp(-3, 3)
    torch.testing.assert_close(found.biases.double(), biases, atol=1e-4, rtol=0)
    assert sum(seen) == (NUM_ITERATIONS + 1) * 40
    assert math.isfinite(float(found.biases.min()))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from colossal_llama.model import output_calibration

    torch.manual_seed(2)
    hidden, old, new = torch.randn(33, 8) + 1, torch.randn(20, 8), torch.randn(6, 8)
    expected = torch.full((6,), 0.01, dtype=torch.float64)
    whole = calibrate(hidden, new, normalizers(hidden, old), expected)
    monkeypatch.setattr(output_calibration, "LOGITS_AT_ONCE", 20)
    parts = calibrate(hidden, new, normalizers(hidden, old), expected)
    torch.testing.assert_close(parts.biases, whole.biases, atol=1e-5, rtol=0)
