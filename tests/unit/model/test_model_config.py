"""A model's `config.json` and `generation_config.json`: what is wrong in them is named, in every script."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from colossal_llama.inference.loading import load_model
from colossal_llama.inference.settings import ModelSettings
from colossal_llama.model.model_config import read_model_config
from colossal_llama.training.llama.loading import load_causal_lm, load_config, random_causal_lm
from colossal_llama.utils.errors import UserError

BOM = b"\xef\xbb\xbf"
# Each reads the two files as one of the scripts does.
READERS: dict[str, Callable[[Path], Any]] = {
    "init_model": lambda directory: read_model_config(directory, f"--source {directory}"),
    "train": lambda directory: load_config(str(directory), False),
    "inference": lambda directory: load_model(ModelSettings(str(directory), device="cpu", dtype="fp32")),
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to change; 500 embeddings."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change(directory: Path, name: str = "config.json", **values: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in LLAMA3_SCALING.items() if name != field}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": 500}, "eos_token_id 500: 500 is outside the vocabulary of 500; write the id"),
        ({"eos_token_id": [2, 501]}, "eos_token_id [2, 501]: 501 is outside"),
        ({"bos_token_id": -1}, "bos_token_id -1: -1 is outside"),
        ({"bos_token_id": "<s>"}, 'bos_token_id "<s>": is not a token id; write whole numbers'),
        ({"bos_token_id": [1]}, "bos_token_id [1]: is not a token id"),
        ({"eos_token_id": True}, "eos_token_id true: is not a token id or a list of them"),
        ({"eos_token_id": [2, None]}, "eos_token_id [2, null]: is not a token id"),
        ({"pad_token_id": 0.0}, "pad_token_id 0.0: is not a token id"),
        ({"pad_token_id": "0"}, 'pad_token_id "0": is not a token id'),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("reader", READERS)
def test_special_tokens_that_no_row_stands_for(
    reader: str, file: str, values: dict, message: str, model: Path
) -> None:
    change(model, file, **values)
    with pytest.raises(UserError) as caught:
        READERS[reader](model)
    (problem,) = caught.value.problems
    assert problem.startswith("--")
    assert f" {model}: {file}: {message}" in problem


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_scaling": {"type": "su"}},
            'rope_scaling.type "su": unknown; transformers\' LLaMA knows default, ',
        ),
        ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type 3: unknown"),
        ({"rope_scaling": {}}, "rope_scaling {}: has no rope_type"),
        ({"rope_scaling": {"factor": 2.0}}, 'rope_scaling {"factor": 2.0}: has no rope_type'),
        ({"rope_scaling": "linear"}, 'rope_scaling "linear": is not an object'),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: rope_type linear needs factor, which it lacks"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, 'rope_scaling.factor "two": is not a number'),
        (
            {"rope_scaling": {"type": "dynamic", "factor": -2}},
            "rope_scaling.factor -2: is not a number above 0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": True}}, "rope_scaling.factor true: is not a number"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
            'rope_scaling.type "linear": rope_type says "dynamic"; leave one of the two out',
        ),
        (
            {"rope_scaling": without("low_freq_factor")},
            "rope_type llama3 needs low_freq_factor, which it lacks",
        ),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1}}, "must be above low_freq_factor 1.0"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": 2, "factor": 2.0}},
            "rope_scaling.long_factor 2: is not a list of numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
            'rope_parameters.rope_type "su": unknown',
        ),
        ({"hidden_size": "64"}, 'hidden_size "64": is not a whole number above 0'),
        ({"vocab_size": 0}, "vocab_size 0: is not a whole number above 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3: does not divide num_attention_heads 4"),
        ({"rope_theta": None}, "rope_theta null: is not a number above 0"),
        ({"tie_word_embeddings": "false"}, 'tie_word_embeddings "false": is not true or false'),
        ({"torch_dtype": "fp16"}, 'torch_dtype "fp16": unknown; write one of float32, float16, bfloat16'),
        ({"attention_dropout": "no"}, 'attention_dropout "no": is not a number'),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_values_that_no_llama_has(reader: str, values: dict, message: str, model: Path) -> None:
    change(model, **values)
    with pytest.raises(UserError) as caught:
        READERS[reader](model)
    assert f" {model}: config.json: " in caught.value.problems[0]
    assert message in "\n".join(caught.value.problems)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a JSON object but an array"),
        ("null", "not a JSON object but null"),
        ('"llama"', "not a JSON object but a string"),
        ("{\n]", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_files_that_hold_no_object(reader: str, file: str, content: str, message: str, model: Path) -> None:
    (model / file).write_text(content)
    with pytest.raises(UserError, match=rf" {model}: {file}[:\d]*: {message}.*cannot be read: copy the file"):
        READERS[reader](model)


def test_all_problems_of_both_files_together(model: Path) -> None:
    change(model, eos_token_id=-1, hidden_size=None, rope_scaling={"type": "su"})
    change(model, "generation_config.json", eos_token_id=900)
    with pytest.raises(UserError) as caught:
        load_config(str(model), False)
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("pad", [-1, 500, 10**6])
def test_padding_outside_the_vocabulary_counts_as_none(
    reader: str, pad: int, model: Path, capsys: pytest.CaptureFixture
) -> None:
    change(model, pad_token_id=pad)
    change(model, "generation_config.json", pad_token_id=pad)
    READERS[reader](model)
    warnings = capsys.readouterr().err
    for file in ("config.json", "generation_config.json"):
        assert f" {model}: {file}: pad_token_id {pad} is outside the vocabulary of 500" in warnings


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_is_accepted(reader: str, model: Path) -> None:
    change(model, rope_theta=5e5)
    change(model, "generation_config.json", eos_token_id=[2, 7])
    for name in ("config.json", "generation_config.json"):
        (model / name).write_bytes(BOM + (model / name).read_bytes())
    loaded = READERS[reader](model)
    if reader == "inference":
        assert loaded.model.config.rope_theta == 5e5
        assert loaded.model.generation_config.eos_token_id == [2, 7]
    elif reader == "train":
        assert loaded.rope_theta == 5e5
        lm = load_causal_lm(str(model), "--pretrained", loaded, torch.float32)
        assert lm.generation_config.eos_token_id == [2, 7]
    else:
        assert loaded["rope_theta"] == 5e5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=2)
    ),
    max_leaves=5,
)
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(["linear", "llama3", "yarn", "longrope", "dynamic", "default", "su"]) | JSON,
        "rope_type": st.sampled_from(["linear", "llama3", "yarn", "longrope", "dynamic", "default"]) | JSON,
        "factor": st.floats() | JSON,
        "low_freq_factor": st.floats() | JSON,
        "high_freq_factor": st.floats() | JSON,
        "original_max_position_embeddings": st.integers(-2, 10**6) | JSON,
        "short_factor": st.lists(st.floats(0.5, 4), min_size=8, max_size=8) | JSON,
        "long_factor": st.lists(st.floats(0.5, 4), min_size=8, max_size=8) | JSON,
        "attention_factor": JSON,
        "beta_fast": JSON,
    },
)


@given(ROPE, st.sampled_from(["bos_token_id", "eos_token_id", "pad_token_id"]), JSON | st.integers(-2, 510))
def test_what_passes_builds_a_model_and_what_does_not_is_explained(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, rope: dict, key: str, token: Any
) -> None:
    """No value of these keys ends in another error than a `UserError`."""
    directory = tmp_path_factory.getbasetemp() / "configured"
    directory.mkdir(exist_ok=True)
    config = json.loads((tiny_model_dir / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rope_scaling": rope, key: token}))
    try:
        loaded = load_config(str(directory), False)
    except UserError:
        return
    model = random_causal_lm(loaded, torch.float32, 0)
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"type": "linear", "factor": 2},
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": 32},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        LLAMA3_SCALING,
    ],
)
def test_every_known_scaling_is_accepted(scaling: dict, model: Path) -> None:
    change(model, rope_scaling=scaling)
    lm = load_causal_lm(str(model), "--pretrained", load_config(str(model), False), torch.float32)
    assert math.isfinite(float(lm(torch.arange(3, 20)[None]).logits.sum()))


@pytest.mark.parametrize("has_generation_file", [True, False])
@pytest.mark.parametrize("pad", [None, 2, 499, -1, 500, 777])
def test_no_padding_token_takes_a_row_out_of_training(
    pad: int | None, has_generation_file: bool, model: Path, tmp_path: Path
) -> None:
    """The model has no such row, and what it saves is what a model with the row would save."""
    change(model, pad_token_id=pad)
    if not has_generation_file:
        (model / "generation_config.json").unlink()
    config = load_config(str(model), False)
    lm = load_causal_lm(str(model), "--pretrained", config, torch.float32)
    assert config.pad_token_id == lm.config.pad_token_id == pad
    assert lm.get_input_embeddings().padding_idx is None
    lm(torch.arange(500)[None]).logits.float().square().mean().backward()
    rows = lm.get_input_embeddings().weight.grad.abs().sum(1)
    assert bool((rows > 0).all())
    lm.config.save_pretrained(tmp_path / "saved")
    lm.generation_config.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text()).get("pad_token_id") == pad
    if pad in (None, 2, 499):
        LlamaForCausalLM.from_pretrained(model).generation_config.save_pretrained(tmp_path / "usual")
        name = "generation_config.json"
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "usual" / name).read_bytes()


def test_a_generation_configuration_of_old_uploads_can_be_saved(model: Path, tmp_path: Path) -> None:
    change(model, "generation_config.json", pad_token_id=-1)
    lm = load_causal_lm(str(model), "--pretrained", load_config(str(model), False), torch.float32)
    lm.generation_config.save_pretrained(tmp_path)
    assert "pad_token_id" not in json.loads((tmp_path / "generation_config.json").read_text())


def test_random_weights_have_no_padding_row_either(model: Path) -> None:
    change(model, pad_token_id=2)
    lm = random_causal_lm(load_config(str(model), False), torch.float32, 0)
    assert lm.get_input_embeddings().padding_idx is None
    assert lm.get_input_embeddings().weight[2].abs().sum() > 0
    assert lm.config.pad_token_id == 2
