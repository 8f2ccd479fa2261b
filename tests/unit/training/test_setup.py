"""What happens before the loop: inputs that can't be read, and the schedule of a resumed run."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
from training_inputs import MAX_LENGTH

from colossal_llama.dataset.dummy_dataset import RandomRows
from colossal_llama.training.arguments import build_parser
from colossal_llama.training.model import load_config, load_tokenizer
from colossal_llama.training.plan import make_plan
from colossal_llama.training.setup import check_resumable, keep_warm_up, open_inputs
from colossal_llama.utils.errors import UserError


def parse(*flags: object) -> argparse.Namespace:
    return build_parser().parse_args(list(map(str, flags)))


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


@pytest.mark.parametrize("is_extended", [False, True])
def test_lora_on_an_extended_model_of_the_hub_asks_for_its_embeddings(
    is_extended, tmp_path, tiny_model_dir, monkeypatch
):
    """`freeze` is what leaving the flag out means elsewhere."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    if is_extended:
        (snapshot / "vocabulary_extension.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path))
    flags = ["--pretrained", "some/model", "--benchmark", "--plugin", "ddp", "--lora_rank", 4]
    if is_extended:
        with pytest.raises(UserError, match=r"--lora_embeddings: .*--pretrained some/model has an extended"):
            open_inputs(parse(*flags))
    else:
        open_inputs(parse(*flags))
    open_inputs(parse(*flags, "--lora_embeddings", "freeze"))


@pytest.mark.parametrize("saved", [{"lora_embeddings": None}, {"lora_embeddings": "freeze"}, {}])
def test_embeddings_that_nothing_was_said_about_were_frozen(saved, tmp_path):
    """Also by a version without the flag."""
    same = {"data": {}, "layout": {}}
    (tmp_path / "running_states.json").write_text(json.dumps({**same, "arguments": saved}))
    for now in (None, "freeze"):
        check_resumable(tmp_path, {**same, "model": {}, "arguments": {"lora_embeddings": now}})
    with pytest.raises(UserError, match="--lora_embeddings: freeze when saved, train now"):
        check_resumable(tmp_path, {**same, "model": {}, "arguments": {"lora_embeddings": "train"}})


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 40), (2, 20), (4, 10)])
def test_warm_up_follows_the_rows_of_a_step(batch_size, expected, tmp_path, tiny_model_dir):
    """20 steps of two rows were asked for and begun."""
    (tmp_path / "lr_scheduler").write_text(json.dumps({"warmup_steps": 20}))
    (tmp_path / "running_states.json").write_text(json.dumps({"rows_per_step": 2}))
    flags = ["--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp", "--accumulation_steps", 1]
    config, rows = load_config(str(tiny_model_dir), False), RandomRows(400, 8, 100, 0)
    for given, warm_up in ((["--warmup_steps", 20], expected), ([], 400 // batch_size // 40)):
        args = parse(*flags, "--batch_size", batch_size, *given)
        plan = make_plan(args, config, rows, 1)
        keep_warm_up(args, Path(tmp_path), plan)
        assert plan.schedule.warmup_steps == warm_up
        assert plan.schedule.total_steps == 400 // batch_size
