"""LoRA around a model: what trains, and which base the adapter names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.training.llama.adapters import add_lora, is_embedding
from colossal_llama.training.llama.loading import load_causal_lm, load_config


@pytest.fixture
def small_model() -> LlamaForCausalLM:
    return make_model(tied=False)


def make_model(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_what_trains(train_embeddings: bool, tied: bool) -> None:
    model = make_model(tied)
    wrapped = add_lora(model, 2, None, 0, train_embeddings)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    others = {name for name in trained if "lora_" not in name}
    assert len(trained) - len(others) == 2 * 7, "A and B of each projection"
    assert all(map(is_embedding, others))
    assert len(others) == train_embeddings * (1 if tied else 2)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_adapter_brings_its_embeddings(tied: bool, tmp_path: Path) -> None:
    """Under the names that peft itself reads."""
    saved = add_lora(make_model(tied), 2, None, 0, True)
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if parameter.requires_grad:
                parameter.fill_(float(len(name)))
    tensors = {name: parameter for name, parameter in saved.named_parameters() if parameter.requires_grad}
    saved.save_pretrained(tmp_path, state_dict=tensors, save_embedding_layers=True)
    model = make_model(tied)
    loaded = dict(add_lora(model, 2, tmp_path, 0, True).named_parameters())
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def base_named_by(model: LlamaForCausalLM, adapter: Path | None = None) -> str:
    return add_lora(model, 2, adapter, 0).peft_config["default"].base_model_name_or_path


def test_a_local_base_model_is_named_by_its_whole_path(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the configuration was read from, and whatever a resumed adapter said."""
    monkeypatch.chdir(tiny_model_dir.parent)
    config = load_config(tiny_model_dir.name, False)
    config.name_or_path = "another/model"
    model = load_causal_lm(tiny_model_dir.name, "--load_checkpoint", config, torch.float32)
    wrapped = add_lora(model, 2, None, 0)
    assert wrapped.peft_config["default"].base_model_name_or_path == str(tiny_model_dir)
    wrapped.peft_config["default"].base_model_name_or_path = "moved/away"
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    model = load_causal_lm(tiny_model_dir.name, "--load_checkpoint", config, torch.float32)
    assert base_named_by(model, tmp_path) == str(tiny_model_dir)


@pytest.mark.parametrize("name", ["some/model", ""])
def test_other_names_stay_as_they_are(name: str, small_model: LlamaForCausalLM) -> None:
    small_model.name_or_path = name
    assert base_named_by(small_model) == name
