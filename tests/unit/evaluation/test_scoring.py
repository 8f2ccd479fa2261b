"""Losses of padded batches, against one window at a time with transformers alone."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.evaluation import scoring
from colossal_llama.evaluation.scoring import Scorer, WindowScore, find_rows_beyond_base, score_batch
from colossal_llama.evaluation.windows import Window
from colossal_llama.utils.errors import UserError


def make_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def make_windows() -> list[Window]:
    generator = np.random.default_rng(1)
    sizes = [(2, 1), (30, 29), (17, 4), (30, 7), (5, 4)]
    return [Window(0, generator.integers(0, 97, size), scored) for size, scored in sizes]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("new_rows", [[], [90, 91, 96], [3, 50]])
def test_scores_are_those_of_each_window_alone(
    tied: bool, new_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 97 * 5)
    model, windows = make_model(tied), make_windows()
    scores = Scorer(model, new_rows).score(windows)
    for window, score in zip(windows, scores, strict=True):
        ids = torch.from_numpy(window.ids)[None].long()
        with torch.no_grad():
            logits = model(ids).logits[0].double()
        masked = logits.clone()
        masked[:, new_rows] = -math.inf
        loss = cost = 0.0
        for position in range(len(window.ids) - window.num_scored, len(window.ids)):
            target = int(ids[0, position])
            nats = [-float(each[position - 1].log_softmax(-1)[target]) for each in (logits, masked)]
            loss += nats[0]
            cost += 0.0 if target in new_rows else nats[0] - nats[1]
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.new_rows_loss == pytest.approx(cost, rel=1e-4, abs=1e-5)


def test_a_batch_that_does_not_fit_is_halved() -> None:
    calls = []

    def score(windows: list[int]) -> list[WindowScore]:
        calls.append(len(windows))
        if len(windows) > 2:
            raise torch.OutOfMemoryError
        return [WindowScore(float(window), 0.0) for window in windows]

    found = score_batch(SimpleNamespace(score=score), [1, 2, 3, 4, 5])
    assert [each.loss for each in found] == [1, 2, 3, 4, 5]
    assert calls == [5, 2, 3, 1, 2]

    def never(windows: list[Window]) -> list[WindowScore]:
        raise torch.OutOfMemoryError

    with pytest.raises(UserError, match="one window of 30 tokens; lower --context_bytes"):
        score_batch(SimpleNamespace(score=never), make_windows()[1:2])


def test_new_rows_are_what_the_base_does_not_have() -> None:
    base = {"a": 0, "b": 1}
    assert find_rows_beyond_base(base, base, 2, 2) == []
    assert find_rows_beyond_base(base, {**base, "c": 2, "d": 3}, 2, 8) == [2, 3, 4, 5, 6, 7]
    assert find_rows_beyond_base(base, {**base, "c": 2, "d": 3}, 4, 4) == [2, 3]  # the base is padded
    assert find_rows_beyond_base(base, {"a": 0, "c": 1}, 2, 2) is None
    assert find_rows_beyond_base(base, {"a": 0}, 2, 2) is None
