"""LoRA on a model with an extended vocabulary: the embeddings train beside the adapters."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from launch import train
from safetensors import safe_open
from safetensors.torch import load_file
from test_resume import few_rows
from training_inputs import TrainingInputs

LORA = ["--lora_rank", 4, "--lora_embeddings", "train"]
SHORT = ["--max_steps", 3, "--lr", 1e-3, "--batch_size", 4, "--accumulation_steps", 2, "--save_interval", 0]
EMBEDDINGS = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}


def extended_inputs(training_inputs: TrainingInputs, directory: Path, tied: bool) -> TrainingInputs:
    """The inputs with a model that looks extended, and has one embedding matrix or two."""
    model = directory / "base"
    if tied:
        inputs = training_inputs.with_tied_model(model)
    else:
        inputs = TrainingInputs(Path(shutil.copytree(training_inputs.model, model)), training_inputs.data)
    (model / "vocabulary_extension.json").write_text("{}")
    return inputs


def load(directory: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=dtype).eval()


def mean_loss(model: torch.nn.Module, part: Path) -> float:
    """Of the tokens with loss, each document by itself."""
    import datasets

    total, count = 0.0, 0
    for row in datasets.load_from_disk(str(part)):
        start = 0
        for length in row["document_lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])[None]
            labels = torch.tensor(row["labels"][start + 1 : start + length])
            start += length
            with torch.no_grad():
                logits = model(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize(
    ("tied", "num_processes", "flags"),
    [
        (False, 2, ["--plugin", "ddp", "--mixed_precision", "fp32", "--use_grad_checkpoint"]),
        (True, 2, ["--plugin", "zero2", "--mixed_precision", "fp32"]),
        (True, 1, ["--plugin", "3d", "--zero_stage", 0, "--mixed_precision", "fp32", "--use_neft"]),
        (False, 1, ["--plugin", "3d", "--zero_stage", 2, "--mixed_precision", "bf16"]),
    ],
)
def test_peft_and_merged_model_are_what_was_trained(tied, num_processes, flags, tmp_path, training_inputs):
    """A checkpoint with merged weights has the adapter beside them."""
    from peft import PeftModel

    from colossal_llama.inference.loading import load_model
    from colossal_llama.inference.settings import ModelSettings

    inputs = extended_inputs(training_inputs, tmp_path, tied)
    part = inputs.data / "part-00002"
    relative = ["--pretrained", os.path.relpath(inputs.model), *inputs.flags()[2:]]
    run = train(
        tmp_path / "run",
        num_processes,
        *relative,
        *SHORT,
        *LORA,
        *flags,
        "--merge_lora",
        "--eval_dataset",
        part,
    )
    assert run.returncode == 0, run.output[-3000:]
    checkpoint = run.save_dir / "epoch-0_step-3"
    expected_names = {name for name in EMBEDDINGS if not (tied and "lm_head" in name)}

    adapter = load_file(checkpoint / "adapter" / "adapter_model.safetensors")
    assert {name for name in adapter if "lora_" not in name} == expected_names
    settings = json.loads((checkpoint / "adapter" / "adapter_config.json").read_text())
    assert Path(settings["base_model_name_or_path"]).is_absolute()
    shards = (checkpoint / "optimizer").glob("*.safetensors")
    names = {key.split("/")[0] for shard in shards for key in safe_open(shard, "pt").keys()}  # noqa: SIM118
    assert {name for name in names if "lora_" not in name} == expected_names

    is_half = "bf16" in flags
    dtype = torch.bfloat16 if is_half else torch.float32
    base, merged = load(inputs.model, dtype), load(checkpoint / "modeling", dtype)
    before, after = base.state_dict(), merged.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if "_proj." not in name} == {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (before[name][-40:] != after[name][-40:]).any(dim=1)
        # Rows of pieces that do not occur are only decayed, by less than bf16 can show.
        assert moved.float().mean() > 0.5 if is_half else moved.all()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"]) == tied
    assert ("lm_head.weight" in load_file(checkpoint / "modeling" / "model.safetensors")) == (not tied)
    adapted = PeftModel.from_pretrained(base, checkpoint / "adapter").eval()
    ids = torch.arange(3, 83)[None]
    with torch.no_grad():
        expected = adapted(ids).logits
        found = merged(ids).logits
    tolerance = 0.05 if is_half else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    (evaluated,) = [record["eval_loss"] for record in run.metrics() if "eval_loss" in record]
    assert mean_loss(adapted, part) == pytest.approx(evaluated, rel=2e-3 if is_half else 1e-5)
    inferred = load_model(ModelSettings(str(checkpoint / "adapter"), device="cpu", dtype="fp32"))
    torch.testing.assert_close(inferred.model(ids).logits, expected.float(), rtol=tolerance, atol=tolerance)


def test_a_run_with_embeddings_continues_on_another_layout(tmp_path, training_inputs):
    """Dropout starts anew there, so losses are alike, not equal."""
    inputs = extended_inputs(training_inputs, tmp_path, tied=True)
    flags = [*few_rows(inputs), *SHORT, *LORA, "--mixed_precision", "fp32"]
    whole = train(tmp_path / "whole", 1, *flags, "--plugin", "ddp", "--max_steps", 6)
    assert whole.returncode == 0, whole.output[-3000:]
    layouts = [
        (2, 1, ["--plugin", "zero2"]),
        (4, 2, ["--plugin", "3d", "--zero_stage", 2, "--batch_size", 2]),
        (6, 1, ["--plugin", "ddp"]),
    ]
    for last_step, num_processes, layout in layouts:
        resume = ["--load_checkpoint", "latest", "--max_steps", last_step]
        run = train(tmp_path / "parts", num_processes, *flags, *layout, *resume)
        assert run.returncode == 0, run.output[-3000:]
    assert run.losses() == pytest.approx(whole.losses(), rel=2e-3)
    assert whole.losses()[-1] < whole.losses()[0] - 0.1
    refused = train(tmp_path / "parts", 1, *flags, "--plugin", "ddp", "--lora_embeddings", "freeze", *resume)
    assert refused.returncode != 0
    assert "--lora_embeddings: train when saved, freeze now" in refused.output
