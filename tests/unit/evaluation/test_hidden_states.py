"""States before the output head against single forward passes; samples of text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from colossal_llama.evaluation import hidden_states
from colossal_llama.evaluation.hidden_states import TextSample, find_hidden_states
from colossal_llama.evaluation.windows import Window


@pytest.fixture
def windows() -> list[Window]:
    ids = np.random.default_rng(0).integers(3, 500, 60).astype(np.int32)
    return [
        Window(7, ids[:9], 5),
        Window(7, ids[9:40], 30),
        Window(8, ids[40:42], 1),
        Window(9, ids[42:], 17),
    ]


@pytest.mark.parametrize("full", [None, 1, 2], ids=["roomy", "one window fits", "two windows fit"])
def test_states_are_those_of_each_window_alone(
    tiny_model_dir: Path, windows: list[Window], monkeypatch: pytest.MonkeyPatch, full: int | None
) -> None:
    """In padded batches, and in halves of them where a GPU's memory is full."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, torch_dtype=torch.float32)
    run = hidden_states._states

    def run_in_little_memory(model: object, chosen: list[Window]) -> list[torch.Tensor]:
        if full is not None and len(chosen) > full:
            raise torch.OutOfMemoryError
        return run(model, chosen)

    monkeypatch.setattr(hidden_states, "_states", run_in_little_memory)
    seen: list[int] = []
    found = find_hidden_states(model, windows, seen.append)
    states, targets, documents = [], [], []
    for window in windows:
        ids = torch.from_numpy(window.ids.astype(np.int64))
        with torch.no_grad():
            alone = model.model(ids[None]).last_hidden_state[0]
        states.append(alone[-window.num_scored - 1 : -1])
        targets.append(ids[-window.num_scored :])
        documents += [window.document] * window.num_scored
    torch.testing.assert_close(found.states, torch.cat(states), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.targets, torch.cat(targets))
    assert found.documents.tolist() == documents
    assert sum(seen) == 60


def test_a_sample_is_fixed_by_its_seed_and_passes_all_texts_on() -> None:
    texts = [f"text {number} " + "x" * (number % 50) for number in range(300)] + [""]
    samples = [TextSample(20, 30, seed) for seed in (1, 1, 2)]
    for sample in samples:
        assert list(sample.pass_on(texts)) == texts
        assert len(sample.texts) == 20
        assert all(len(text) <= 30 and any(text in whole for whole in texts) for text in sample.texts)
    assert samples[0].texts == samples[1].texts != samples[2].texts
    # Not only the beginning of the corpus.
    assert len({text for text in samples[0].texts if text not in [whole[:30] for whole in texts[:20]]}) > 5
