"""Parameter groups: who is in which, and the rates that they get."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.training.adaptation import AdaptationSettings
from colossal_llama.training.llama.adapters import add_lora
from colossal_llama.training.plugins.groups import IS_EMBEDDINGS, parameter_groups, set_learning_rates

SHAPE = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def make_model(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=tied))


def named(model: torch.nn.Module, groups: list[dict]) -> list[tuple[set[str], bool, bool]]:
    """(names, is for embeddings, decays) of each group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ({names[p] for p in group["params"]}, IS_EMBEDDINGS in group, "weight_decay" not in group)
        for group in groups
    ]


def test_without_flags_there_is_one_group_in_the_model_s_order() -> None:
    model = make_model()
    (group,) = parameter_groups(model, AdaptationSettings())
    assert list(group) == ["params"]
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))


@given(
    st.booleans(),
    st.none() | st.just(1e-3),
    st.sets(st.sampled_from(["norms", "embeddings"])),
    st.sampled_from([False, True, "new_rows"]),
)
def test_each_parameter_is_in_the_group_that_its_name_says(tied, rate, no_decay, frozen) -> None:
    model = make_model(tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in EMBEDDINGS or not frozen)
    settings = AdaptationSettings(
        freeze_non_embeds_params=frozen, lr_embeddings=rate, no_decay=sorted(no_decay) or None
    )
    groups = named(model, parameter_groups(model, settings))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(name for names, *_ in groups for name in names) == sorted(trained)
    for names, apart, decays in groups:
        for name in names:
            is_embedding = name in EMBEDDINGS
            assert apart == (is_embedding and rate is not None)
            if is_embedding:
                assert decays == ("embeddings" not in no_decay and frozen != "new_rows")
            else:
                assert decays == ("norms" not in no_decay or "norm" not in name)
    assert len({(apart, decays) for _, apart, decays in groups}) == len(groups)


def test_embeddings_beside_adapters_are_a_group() -> None:
    model = add_lora(make_model(), 2, None, 0, True)
    settings = AdaptationSettings(lora_rank=2, lora_embeddings="train", lr_embeddings=1e-5)
    (others, *_), (embeddings, apart, _) = named(model, parameter_groups(model, settings))[::-1]
    assert embeddings == {f"base_model.model.{name}" for name in EMBEDDINGS}
    assert apart
    assert all("lora_" in name for name in others)


@pytest.mark.parametrize("rate", [None, 0.0, 0.2])
def test_rates_of_a_step(rate: float | None) -> None:
    model = make_model()
    settings = AdaptationSettings(lr_embeddings=rate, no_decay=["norms"])
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), lr=9.0, weight_decay=0.1)
    set_learning_rates(optimizer, 0.5, rate)
    for group in optimizer.param_groups:
        assert group["lr"] == (rate if group.get(IS_EMBEDDINGS) else 0.5)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
