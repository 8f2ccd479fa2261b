"""Models and data that a run can't begin with; each problem names what was given."""

from __future__ import annotations

import shutil

import pytest
from training_inputs import MAX_LENGTH

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.inputs import open_inputs
from colossal_llama.training.llama.loading import load_config, load_tokenizer
from colossal_llama.training.settings import RunSettings
from colossal_llama.utils.errors import UserError


def parse(*flags: object) -> RunSettings:
    return parse_settings(list(map(str, flags)))


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": 1', "", "[]"])
@pytest.mark.parametrize(("name", "load"), [("tokenizer.json", load_tokenizer), ("config.json", load_config)])
def test_damaged_files_of_a_model_are_named(name, load, content, tmp_path, tiny_model_dir):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (model / name).write_text(content)
    with pytest.raises(UserError, match=r"--pretrained .*model: .*cannot be read"):
        load(str(model), False)


def test_bad_data_and_bad_evaluation_data_are_named_together(tmp_path, training_inputs):
    directories = [tmp_path / name for name in ("train", "first", "second")]
    for directory in directories:
        directory.mkdir()
    flags = ["--pretrained", training_inputs.model, "--dataset", directories[0], "--plugin", "ddp"]
    with pytest.raises(UserError) as caught:
        open_inputs(parse(*flags, "--eval_dataset", *directories[1:], "--max_length", MAX_LENGTH))
    names = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert names == [
        f"--{flag} {directory}"
        for flag, directory in zip(("dataset", "eval_dataset", "eval_dataset"), directories, strict=True)
    ]


@pytest.fixture
def hub_model(tmp_path, tiny_model_dir, monkeypatch):
    """The directory of `some/model` in the cache of the hub."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path))
    return snapshot


@pytest.mark.parametrize("is_extended", [False, True])
def test_lora_on_an_extended_model_of_the_hub_asks_for_its_embeddings(is_extended, hub_model):
    """`freeze` is what leaving the flag out means elsewhere."""
    if is_extended:
        (hub_model / "vocabulary_extension.json").write_text("{}")
    flags = ["--pretrained", "some/model", "--benchmark", "--plugin", "ddp", "--lora_rank", 4]
    if is_extended:
        with pytest.raises(UserError, match=r"--lora_embeddings: .*--pretrained some/model has an extended"):
            open_inputs(parse(*flags))
    else:
        open_inputs(parse(*flags))
    open_inputs(parse(*flags, "--lora_embeddings", "freeze"))


def test_new_rows_of_a_model_of_the_hub(hub_model):
    flags = ["--pretrained", "some/model", "--benchmark", "--plugin", "ddp"]
    report = hub_model / "vocabulary_extension.json"
    assert open_inputs(parse(*flags)).new_ids is None
    flags += ["--freeze_non_embeds_params", "new_rows"]
    with pytest.raises(UserError, match=r"new_rows: --pretrained some/model has no vocabulary_extension"):
        open_inputs(parse(*flags))
    report.write_text('{"counts": {"source_vocabulary_size": 9, "target_vocabulary_size": 12}}')
    assert open_inputs(parse(*flags)).new_ids == range(9, 12)
    report.write_text('{"counts": {"source_vocabulary_size": 9, "target_vocabulary_size": 1000000}}')
    with pytest.raises(UserError, match=r"counts 1,000,000 tokens, the model has only .* run .*init_model"):
        open_inputs(parse(*flags))
