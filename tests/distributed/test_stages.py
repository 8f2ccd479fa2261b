"""Branches of a run, and stages that keep the optimizer, in a model whose context was made longer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, Run, train
from test_resume import assert_same_run, rows, weights_of
from training_inputs import prepare

WSD = ["--lr_schedule", "wsd", "--warmup_steps", 2, "--lr", 1e-3]
BRANCH = [*WSD, "--decay_start", 4, "--decay_steps", 3, "--decay_shape", "linear", "--min_lr_ratio", 0]
LONGER = ["--rope_theta", 2e4, "--rope_scaling", "yarn:2"]
DDP = ["--plugin", "ddp", "--mixed_precision", "fp32", *rows(8, 2)]
SEED = 42


def part_flags(training_inputs, part: int) -> list:
    dataset = training_inputs.data / f"part-0000{part}"
    return ["--pretrained", training_inputs.model, "--dataset", dataset, "--max_length", 96]


def checked(run: Run) -> Run:
    assert run.returncode == 0, run.output[-3000:]
    return run


def loss_of_rows(model, data, chosen) -> tuple[torch.Tensor, int]:
    """Summed loss and tokens with loss, document by document."""
    loss_sum, num_labels = torch.zeros(()), 0
    for row in chosen:
        start = 0
        for length in data[int(row)]["document_lengths"]:
            ids = torch.tensor(data[int(row)]["input_ids"][start : start + length])[None]
            labels = torch.tensor(data[int(row)]["labels"][start : start + length])[None, 1:]
            start += length
            logits = model(input_ids=ids).logits[:, :-1]
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            num_labels += int((labels != -100).sum())
    return loss_sum, num_labels


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, training_inputs) -> Run:
    """Four steps of a run that has no decay yet."""
    flags = [*part_flags(training_inputs, 0), *WSD, *DDP, *LONGER, "--max_steps", 4]
    return checked(train(tmp_path_factory.mktemp("trunk"), 1, *flags))


def test_a_branch_equals_the_run_that_decayed_there_from_the_start(tmp_path, training_inputs, trunk):
    import datasets
    from transformers import AutoModelForCausalLM

    evaluation = training_inputs.data / "part-00002"
    flags = [*part_flags(training_inputs, 0), *BRANCH, *DDP, "--eval_dataset", evaluation]
    whole = checked(train(tmp_path / "whole", 1, *flags, *LONGER))
    start = trunk.save_dir / "epoch-0_step-4"
    branch = checked(train(tmp_path / "branch", 1, *flags, *LONGER, "--load_checkpoint", start))
    metrics = whole.metrics()
    expected = [1e-3 * share for share in (1 / 2, 1, 1, 1, 1, 2 / 3, 1 / 3)]
    assert [record["lr"] for record in metrics] == pytest.approx(expected)
    for a, b in zip(branch.metrics(), metrics[4:], strict=True):
        for key in ("step", "epoch", "tokens", "loss", "lr", "grad_norm"):
            assert a[key] == b[key]
    final = weights_of(whole.save_dir / "modeling")
    assert final
    assert weights_of(branch.save_dir / "modeling") == final
    assert "--decay_start default -> 4" in branch.output
    # What is saved computes what was trained.
    config = json.loads((whole.save_dir / "modeling" / "config.json").read_text())
    assert (config["rope_theta"], config["max_position_embeddings"]) == (2e4, 1024)
    model = AutoModelForCausalLM.from_pretrained(whole.save_dir / "modeling")
    data = datasets.load_from_disk(str(evaluation))
    with torch.no_grad():
        loss_sum, num_labels = loss_of_rows(model, data, range(len(data)))
    assert metrics[-1]["eval_loss"] == pytest.approx(float(loss_sum) / num_labels, rel=1e-5)


def test_a_stage_that_keeps_the_optimizer_equals_a_plain_loop(tmp_path, training_inputs, trunk):
    """A loop that shares no code: the checkpoint's weights, and AdamW with its moments, over new data."""
    import datasets
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    start = trunk.save_dir / "epoch-0_step-4"
    flags = [*part_flags(training_inputs, 1), *DDP, *LONGER, "--lr_schedule", "constant", "--lr", 5e-4]
    stage = checked(
        train(tmp_path, 1, *flags, "--load_checkpoint", start, "--keep_optimizer", "--max_steps", 2)
    )
    model = AutoModelForCausalLM.from_pretrained(start / "modeling")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"Kept Adam's moments of {total:,} of {total:,} trained parameters and its step count, 4," in (
        " ".join(stage.output.split())
    )
    data = datasets.load_from_disk(str(training_inputs.data / "part-00001"))
    order = np.arange(len(data), dtype=np.uint32)
    np.random.default_rng([SEED, 0, 0]).shuffle(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1)
    (file,) = (start / "optimizer").glob("*.safetensors")
    saved = load_file(file)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(4.0),
            "exp_avg": saved[f"{name}/exp_avg"].view_as(parameter),
            "exp_avg_sq": saved[f"{name}/exp_avg_sq"].view_as(parameter),
        }
    losses = []
    for step in range(2):
        loss_sum, num_labels = loss_of_rows(model, data, order[16 * step : 16 * (step + 1)])
        (loss_sum / num_labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss_sum) / num_labels)
    assert stage.losses() == pytest.approx(losses, rel=1e-5)
    assert [record["step"] for record in stage.metrics()] == [1, 2]
    final = load_file(stage.save_dir / "modeling" / "model.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(final[name], parameter.detach(), rtol=1e-4, atol=2e-6)


def extended(source: Path, directory: Path, pieces: list[str]) -> Path:
    """A model whose vocabulary has more pieces than that of `source`, by the project's own commands."""
    directory.mkdir()
    listed, tokenizer, model = (directory / name for name in ("pieces.jsonl", "tokenizer", "model"))
    listed.write_text("".join(json.dumps({"piece": piece}, ensure_ascii=False) + "\n" for piece in pieces))
    commands = {
        "tokenizer/init_tokenizer.py": {
            "--source_tokenizer_dir": source,
            "--target_tokenizer_dir": tokenizer,
            "--expand_tokens_file": listed,
        },
        "model/init_model.py": {
            "--source_model_and_tokenizer_path": source,
            "--target_tokenizer_path": tokenizer,
            "--target_model_path": model,
        },
    }
    for script, flags in commands.items():
        arguments = [str(item) for flag in flags.items() for item in flag]
        subprocess.run(
            [sys.executable, str(ROOT / "colossal_llama" / script), *arguments],
            check=True,
            capture_output=True,
        )
    return model


LAYOUTS = {
    "zero2 bf16": (2, ["--plugin", "zero2", "--mixed_precision", "bf16", *rows(4, 2)]),
    "3d tp 2 zero 1 bf16": (2, ["--plugin", "3d", "--tp", 2, "--mixed_precision", "bf16", *rows(8, 2)]),
    "3d pp 2 fp32": (
        2,
        ["--plugin", "3d", "--pp", 2, "--microbatch_size", 4, "--mixed_precision", "fp32", *rows(8, 2)],
    ),
}


@pytest.mark.slow  # four runs of two processes each
@pytest.mark.parametrize("name", LAYOUTS)
def test_branches_and_second_extensions_in_other_layouts(name, tmp_path, training_inputs):
    """Bit for bit on one layout; a second extension of the vocabulary keeps the moments of known rows."""
    processes, layout = LAYOUTS[name]
    flags = [*part_flags(training_inputs, 0), *layout]
    trunk = checked(train(tmp_path / "trunk", processes, *flags, *WSD, "--max_steps", 4))
    start = trunk.save_dir / "epoch-0_step-4"
    whole = checked(train(tmp_path / "whole", processes, *flags, *BRANCH))
    shutil.copytree(trunk.directory, tmp_path / "branch")
    latest = ["--load_checkpoint", "latest"]
    branch = checked(train(tmp_path / "branch", processes, *flags, *BRANCH, *latest))
    assert_same_run(branch, whole)

    model = extended(start / "modeling", tmp_path / "extended", ["learn", "water", "人工"])
    data = prepare(training_inputs.data.parents[1] / "raw", model, tmp_path / "data", 1)
    stage_flags = ["--pretrained", model, "--dataset", data, "--max_length", 96, *layout, "--max_steps", 1]
    stage_flags += ["--load_checkpoint", start, "--keep_optimizer", "--lr", 1e-4]
    stage = checked(train(tmp_path / "stage", processes, *stage_flags))
    output = " ".join(stage.output.split())
    config = json.loads((model / "config.json").read_text())
    added = config["vocab_size"] - 501
    assert added >= 3
    assert f"{2 * added * 64:,} start at zero (rows of the embeddings from 501 on are among them)" in output
    # The same from the base, which has other weights: refused.
    other = extended(training_inputs.model, tmp_path / "other", ["learn", "water", "人工"])
    stage_flags[1] = other
    refused = train(tmp_path / "refused", processes, *stage_flags)
    assert refused.returncode != 0
    assert "are not those of" in " ".join(refused.output.split())


@pytest.mark.slow  # three runs
def test_adapters_continue_with_their_optimizer(tmp_path, training_inputs):
    """A stage whose rate is 0 saves the adapters that it began with."""
    lora = ["--plugin", "zero2", "--mixed_precision", "bf16", *rows(8, 2), "--lora_rank", 4]
    first = checked(train(tmp_path / "first", 1, *part_flags(training_inputs, 0), *lora, "--max_steps", 2))
    start = first.save_dir / "epoch-0_step-2"
    stage_flags = [*part_flags(training_inputs, 1), *lora, "--load_checkpoint", start, "--keep_optimizer"]
    stage = checked(train(tmp_path / "stage", 1, *stage_flags, "--max_steps", 1, "--lr", 0))
    assert "; 0 start at zero" in " ".join(stage.output.split())
    before = weights_of(start / "modeling")
    assert before
    assert weights_of(stage.save_dir / "modeling") == before
    refused = train(tmp_path / "refused", 1, *stage_flags, "--lora_embeddings", "train")
    assert refused.returncode != 0
    assert "--lora_embeddings: freeze in " in refused.output
