"""The small files of `modeling/`: made before training, copied byte for byte, loaded and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from corpus import sample_texts
from transformers import AutoTokenizer, GenerationConfig

from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.conversation.colossal import ColossalTemplate
from colossal_llama.training.checkpoint.model_files import (
    ModelFiles,
    find_model_directory,
    prepare_model_files,
)
from colossal_llama.training.llama.loading import load_config, load_tokenizer
from colossal_llama.utils.errors import UserError


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def prepare(model: Path | str, **options) -> ModelFiles:
    name = str(model)
    return prepare_model_files(
        name,
        name,
        "--pretrained",
        load_config(name, False),
        torch.bfloat16,
        load_tokenizer(name, False),
        **options,
    )


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def test_files_are_the_source_s_bytes(model: Path) -> None:
    (model / "vocabulary_extension.json").write_text('{ "kind":1 }')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (model / "tokenization_own.py").write_text("# own\n")
    (model / "notes.txt").write_text("not the tokenizer's")
    files = prepare(model)
    names = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    names |= {"vocabulary_extension.json", "additional_chat_templates/tools.jinja", "tokenization_own.py"}
    assert set(files.beside_adapter) == names
    assert set(files.beside_weights) == names | {"config.json", "generation_config.json"}
    for name in names | {"generation_config.json"}:
        assert files.beside_weights[name] == (model / name).read_bytes(), name
    config = json.loads((model / "config.json").read_text())
    assert json.loads(files.beside_weights["config.json"]) == {**config, "torch_dtype": "bfloat16"}
    assert files.notes == []


def test_what_an_earlier_save_spoilt_is_repaired(model: Path, tmp_path: Path, capfd) -> None:
    """`save_pretrained` writes "add_prefix_space": null; slow and fast then differ on every text."""
    source = [AutoTokenizer.from_pretrained(model, use_fast=fast) for fast in (False, True)]
    texts = sample_texts(30, seed=2)
    assert source[0](texts).input_ids == source[1](texts).input_ids
    source[1].save_pretrained(model)
    assert json.loads((model / "tokenizer_config.json").read_text())["add_prefix_space"] is None
    spoilt = AutoTokenizer.from_pretrained(model, use_fast=False)
    assert all(a != b for a, b in zip(spoilt(texts).input_ids, source[0](texts).input_ids, strict=True))

    files = prepare(model)
    assert f'{model / "tokenizer_config.json"}: "add_prefix_space": null makes' in capfd.readouterr().err
    written = tmp_path / "written"
    written.mkdir()
    for name, content in files.beside_weights.items():
        (written / name).write_bytes(content)
        if name not in ("tokenizer_config.json", "config.json"):
            assert content == (model / name).read_bytes()
    for use_fast in (False, True):
        found = AutoTokenizer.from_pretrained(written, use_fast=use_fast)
        assert found(texts).input_ids == source[0](texts).input_ids


def test_a_null_prefix_that_does_no_harm_stays(model: Path, capfd) -> None:
    change_json(model / "tokenizer_config.json", legacy=True, add_prefix_space=None)
    assert b'"add_prefix_space": null' in prepare(model).beside_weights["tokenizer_config.json"]
    assert capfd.readouterr().err.count("warning") == 0


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_ends_of_answers_are_saved_with_an_adapter_too(model: Path, lora_rank: int) -> None:
    files = prepare(model, answer_ends=[7], lora_rank=lora_rank)
    for contents in (files.beside_weights, files.beside_adapter):
        assert json.loads(contents["generation_config.json"])["eos_token_id"] == [2, 7]
    for ends in (None, [], [2]):
        same = prepare(model, answer_ends=ends).beside_weights["generation_config.json"]
        assert same == (model / "generation_config.json").read_bytes()
    assert "generation_config.json" not in prepare(model).beside_adapter


def test_ends_last_where_config_json_states_sampling(model: Path, tmp_path: Path) -> None:
    """transformers' `generate` would take what config.json says, if the file seemed to come from there."""
    change_json(model / "config.json", temperature=0.5, do_sample=True)
    change_json(model / "generation_config.json", temperature=0.5, do_sample=True)
    content = prepare(model, answer_ends=[7]).beside_weights["generation_config.json"]
    (tmp_path / "generation_config.json").write_bytes(content)
    assert not GenerationConfig.from_pretrained(tmp_path)._from_model_config


def test_a_repair_is_noted(model: Path) -> None:
    change_json(model / "generation_config.json", temperature=0.9)
    files = prepare(model)
    assert [note.split(" has no meaning")[0] for note in files.notes] == [
        f"{model / 'generation_config.json'}: temperature 0.9"
    ]
    assert "temperature" not in json.loads(files.beside_weights["generation_config.json"])


def test_a_tokenizer_whose_files_are_not_all_there(model: Path, tmp_path: Path) -> None:
    name = str(model)
    tokenizer = load_tokenizer(name, False)
    tokenizer.add_tokens(["<|new|>"])
    config = load_config(name, False)
    with pytest.raises(UserError, match="are another tokenizer than it is itself"):
        prepare_model_files(name, name, "--pretrained", config, torch.bfloat16, tokenizer)


def test_a_configuration_that_can_not_be_saved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    def fail(self: LlamaConfig, directory: Path) -> None:
        raise TypeError("Object of type Thing is not JSON serializable")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"config.json can be loaded, but not saved .*type Thing"):
        prepare(model)


def test_a_name_of_the_hub_means_the_cached_files(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.utils import hub

    repository = tmp_path / "cache" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, snapshot)
    (snapshot / "vocabulary_extension.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_is_offline_mode", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model_directory("someone/tiny") == snapshot
    files = prepare("someone/tiny")
    for name in ("tokenizer.model", "tokenizer_config.json", "vocabulary_extension.json"):
        assert files.beside_weights[name] == (snapshot / name).read_bytes()
    with pytest.raises(UserError, match="someone/other: no"):
        find_model_directory("someone/other")


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_the_template_of_the_data_is_in_every_tokenizer(model: Path, lora_rank: int) -> None:
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    change_json(
        model / "tokenizer_config.json", chat_template=[{"name": "default", "template": "x"}], extra=1e30
    )
    template = CarriedTemplate.of_template(
        ColossalTemplate.of_tokenizer(load_tokenizer(str(model), False), 2)
    )
    before = json.loads((model / "tokenizer_config.json").read_text())
    files = prepare(model, answer_ends=[2], template=template, lora_rank=lora_rank)
    for contents in (files.beside_weights, files.beside_adapter):
        config = json.loads(contents["tokenizer_config.json"])
        assert config == {**before, "chat_template": template.text}
        assert list(config) == list(before)
        assert not [name for name in contents if "jinja" in name]
        assert "generation_config.json" in contents
    # Without one, everything stays as it is.
    files = prepare(model, answer_ends=[2])
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenizer_config.json"):
        assert files.beside_weights[name] == (model / name).read_bytes()


def test_a_tokenizer_that_splits_conversations_otherwise(model: Path) -> None:
    template = CarriedTemplate.of_template(
        ColossalTemplate.of_tokenizer(load_tokenizer(str(model), False), 2)
    )
    change_json(model / "tokenizer_config.json", legacy=True)
    with pytest.raises(UserError, match="splits conversations otherwise than the one that prepared the data"):
        prepare(model, answer_ends=[2], template=template)
