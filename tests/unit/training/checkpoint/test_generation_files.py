"""`generation_config.json`: whatever loads can be saved, or is refused by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig

from colossal_llama.training.checkpoint.generation_files import (
    RESETTABLE,
    add_end_token_ids,
    end_token_ids,
    load_generation_config,
)
from colossal_llama.utils.errors import UserError

CONFIG = LlamaConfig(bos_token_id=1, eos_token_id=2)


def load(directory: Path, content: Any) -> tuple[GenerationConfig, list[str]]:
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return load_generation_config(directory, CONFIG, "--pretrained x")


def assert_can_be_saved(config: GenerationConfig, directory: Path) -> None:
    config.save_pretrained(directory)
    loaded = GenerationConfig.from_pretrained(directory).to_dict()
    assert loaded.pop("transformers_version")
    assert loaded.items() <= config.to_dict().items()


@pytest.mark.parametrize(
    ("content", "given_up"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, ["temperature", "top_p"]),
        ({"temperature": 0.9, "top_p": 0.6, "do_sample": True}, []),
        ({"top_k": 10}, ["top_k"]),
        ({"top_k": 10, "penalty_alpha": 0.5}, []),
        ({"min_p": 0.1, "typical_p": 0.5}, ["min_p", "typical_p"]),
        ({"early_stopping": True, "length_penalty": 2.0}, ["early_stopping", "length_penalty"]),
        ({"num_beams": 4, "early_stopping": True, "length_penalty": 2.0}, []),
        ({"num_beam_groups": 2, "diversity_penalty": 0.5}, ["diversity_penalty", "num_beam_groups"]),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({"eos_token_id": [2, 3], "repetition_penalty": 1.1, "max_length": -5}, []),
    ],
)
def test_mere_defaults_are_given_up(tmp_path: Path, content: dict, given_up: list[str]) -> None:
    found, notes = load(tmp_path, content)
    named = [note.split(": ")[1].split()[0] for note in notes]
    assert sorted(named) == sorted(given_up)
    assert all(note.startswith(f"{tmp_path / 'generation_config.json'}: ") for note in notes)
    for name, value in content.items():
        default = getattr(GenerationConfig(), name)
        assert getattr(found, name) == (default if name in given_up else value)
    assert_can_be_saved(found, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "not a JSON object"),
        ("7", "not a JSON object"),
        ('{\n"eos_token_id": 2,\n', "not valid JSON"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"num_return_sequences": 3}, "num_return_sequences"),
        ({"num_beams": 4, "num_beam_groups": "two"}, "generation_config.json"),
        ({"cache_implementation": "clay tablets"}, "cache_implementation"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>' is neither"),
        ({"eos_token_id": [2, "</s>"]}, "is neither"),
        ({"eos_token_id": True}, "is neither"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, content)
    assert "generation_config.json" in str(caught.value)
    assert said in str(caught.value)


VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([-1, 0, 0.5, 1, 2, 3, 1.5, "never", "static"]))


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from([*RESETTABLE, "max_new_tokens", "use_cache", "penalty_alpha"]), VALUES)
)
def test_whatever_is_not_refused_can_be_saved(content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        refusal = None
        try:
            found, _ = load(Path(name), content)
        except UserError as error:
            refusal = str(error)
        if refusal is None:
            assert_can_be_saved(found, Path(name))
        else:
            assert "generation_config.json" in refusal


def test_without_a_file_the_model_s_configuration_holds(tmp_path: Path) -> None:
    found, notes = load_generation_config(tmp_path, CONFIG, "--pretrained x")
    assert (found.eos_token_id, notes) == (2, [])
    sampling = LlamaConfig(eos_token_id=2, temperature=0.5)
    found, notes = load_generation_config(None, sampling, "--pretrained x")
    assert notes[0].startswith("--pretrained x: config.json: temperature 0.5 ")
    assert_can_be_saved(found, tmp_path)


@pytest.mark.parametrize(
    ("own", "model", "ends", "expected"),
    [
        (2, 2, [2], 2),
        ([2, 3], 2, [3], [2, 3]),
        (2, 2, [7], [2, 7]),
        ([5, 2], 2, [7, 2], [5, 2, 7]),
        (None, 2, [7], [2, 7]),
        (None, [2, 4], [4], [2, 4]),
        (None, None, [7], 7),
        (2, 2, [], 2),
        (None, 2, [], None),
    ],
)
def test_ends_of_answers_come_after_the_source_s(own: Any, model: Any, ends: list, expected: Any) -> None:
    config = GenerationConfig(eos_token_id=own)
    config._from_model_config = True
    add_end_token_ids(config, ends, model)
    assert config.eos_token_id == expected
    assert set(ends) <= set(end_token_ids(config))
    assert config._from_model_config == (expected == own), "else generate would make it anew without the ends"
