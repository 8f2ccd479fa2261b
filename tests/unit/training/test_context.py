"""Longer context: the configuration that is trained, saved, and computed with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import make_config, parse
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from colossal_llama.model.model_config import find_context_length, read_model_config
from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.llama.attention import install_attention
from colossal_llama.training.llama.loading import find_too_long_rows, load_causal_lm
from colossal_llama.upstream.rotary_frequencies import restore_rotary_frequencies
from colossal_llama.upstream.rotary_lengths import rotate_documents_alone
from colossal_llama.utils.errors import UserError

POSITIONS = 16


def apply(flags: str, **changes: object) -> LlamaConfig:
    config = make_config(**{"max_position_embeddings": POSITIONS, **changes})
    parse(flags).context.apply(config)
    return config


LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("flags", "scaling", "positions", "context"),
    [
        ("--rope_theta 5e5", None, 16, 16),
        ("--rope_theta 5e5 --max_position_embeddings 64", None, 64, 64),
        ("--rope_scaling linear:4", {"rope_type": "linear", "factor": 4.0}, 16, 64),
        ("--rope_scaling dynamic:1.5", {"rope_type": "dynamic", "factor": 1.5}, 16, 24),
        (
            "--rope_scaling linear:2 --max_position_embeddings 32",
            {"rope_type": "linear", "factor": 2.0},
            32,
            64,
        ),
        (
            "--rope_scaling yarn:4",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            64,
            64,
        ),
        (
            "--rope_scaling llama3:8 --max_position_embeddings 256",
            {**LLAMA31, "original_max_position_embeddings": 16},
            256,
            256,
        ),
    ],
)
def test_what_the_flags_make_of_a_configuration(flags, scaling, positions, context, tmp_path):
    config = apply(flags)
    assert (config.rope_scaling, config.max_position_embeddings) == (scaling, positions)
    assert config.rope_theta == (5e5 if "theta" in flags else 10000.0)
    assert find_context_length(config) == context
    assert find_too_long_rows(config, context) == []
    (problem,) = find_too_long_rows(config, context + 1)
    for flag in ("--rope_theta", "--rope_scaling", "--max_position_embeddings"):
        assert flag in problem
    # Applied to what it made, a flag changes nothing: a resumed run may take it from the checkpoint.
    again = LlamaConfig.from_dict(config.to_dict())
    parse(flags).context.apply(again)
    assert again.to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    assert read_model_config(tmp_path, "here")["rope_scaling"] == scaling


def test_a_model_that_is_scaled_already():
    """The factor counts from the positions that the model was first trained with."""
    before = {"rope_scaling": LLAMA31, "max_position_embeddings": 131072}
    config = apply("--rope_scaling yarn:32", **before)
    assert config.max_position_embeddings == 32 * 8192
    assert config.rope_scaling["original_max_position_embeddings"] == 8192
    assert apply("--rope_scaling llama3:8", **before).to_dict() == make_config(**before).to_dict()


def test_no_flag_changes_nothing():
    assert apply("").to_dict() == make_config(max_position_embeddings=POSITIONS).to_dict()


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--rope_scaling yarn", "--rope_scaling yarn: give TYPE:FACTOR"),
        (
            "--rope_scaling longrope:2",
            "--rope_scaling longrope:2: give TYPE:FACTOR, TYPE being one of linear",
        ),
        ("--rope_scaling yarn:0.5", "--rope_scaling yarn:0.5: FACTOR has to be a number of at least 1"),
        ("--rope_scaling yarn:nan", "FACTOR has to be a number of at least 1"),
        ("--rope_theta 0", "--rope_theta 0: must be above 0"),
        ("--rope_theta 5e5 --lora_rank 4 --plugin ddp", "--rope_theta: with --lora_rank 4, only the adapter"),
    ],
)
def test_bad_flags(flags, problem, capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--pretrained", "some/model", "--benchmark", *flags.split()])
    assert problem in capsys.readouterr().err


def test_positions_that_contradict_the_factor():
    with pytest.raises(UserError, match=r"--max_position_embeddings 60: .* 4 x 16 = 64 positions"):
        apply("--rope_scaling yarn:4 --max_position_embeddings 60")
    assert apply("--rope_scaling yarn:4 --max_position_embeddings 64").max_position_embeddings == 64


@given(
    kind=st.sampled_from(["linear", "dynamic", "yarn", "llama3"]),
    factor=st.floats(1, 40),
    theta=st.sampled_from([1e4, 5e5]),
    documents=st.lists(st.integers(1, 40), min_size=1, max_size=4),
)
def test_packed_documents_equal_transformers_with_the_same_configuration(kind, factor, theta, documents):
    """Logits of documents packed into a row, and of each alone in a fresh model of transformers."""
    torch.manual_seed(0)
    config = apply(f"--rope_scaling {kind}:{factor!r} --rope_theta {theta}", num_hidden_layers=2)
    model = LlamaForCausalLM(config)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()  # as colossalai's plugins do
    install_attention(model, None, None)
    restore_rotary_frequencies(model)
    rotate_documents_alone(model)
    reference = LlamaForCausalLM(config)
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(0, config.vocab_size, (1, sum(documents)))
    index = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))[None]
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    with torch.no_grad():
        hidden = model.model(ids, attention_mask=index, position_ids=positions, use_cache=False)[0]
        ours = model.lm_head(hidden).split(documents, dim=1)
        for document, logits in zip(ids.split(documents, dim=1), ours, strict=True):
            reference.model.rotary_emb = type(rotary)(config)  # that has seen nothing yet
            torch.testing.assert_close(logits, reference(document).logits, rtol=1e-4, atol=1e-5)


def test_a_saved_model_loads_as_it_was_trained(tiny_model_dir, tmp_path):
    from colossal_llama.training.llama.loading import load_config

    plain = load_causal_lm(
        str(tiny_model_dir), "--pretrained", load_config(str(tiny_model_dir), False), torch.float32
    )
    config = load_config(str(tiny_model_dir), False)
    parse("--rope_scaling yarn:2 --rope_theta 2e4").context.apply(config)
    model = load_causal_lm(str(tiny_model_dir), "--pretrained", config, torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert find_context_length(loaded.config) == 1024
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours, theirs, before = (each(ids).logits for each in (model, loaded, plain))
    torch.testing.assert_close(ours, theirs)
    assert (ours - before).abs().max() > 1e-3
