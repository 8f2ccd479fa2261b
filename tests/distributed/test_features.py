"""What the flags of `train.py` promise, in real runs of one or two processes."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import environment, train
from support import ROOT

SHORT = ["--max_steps", 3, "--lr", 1e-3, "--batch_size", 4, "--accumulation_steps", 2, "--save_interval", 0]
ZERO2 = ["--plugin", "zero2", "--mixed_precision", "bf16"]
DDP = ["--plugin", "ddp", "--mixed_precision", "fp32"]


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("layout", [["--tp", 2], ["--pp", 2]])
def test_frozen_model_trains_its_embeddings_only(layout, tmp_path, training_inputs):
    """The row of `<s>` too, though a configuration that calls it padding would freeze it."""
    model = Path(shutil.copytree(training_inputs.model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 1}))
    flags = ["--plugin", "3d", *layout, "--mixed_precision", "fp32", "--freeze_non_embeds_params"]
    run = train(tmp_path, 2, *training_inputs.flags(), "--pretrained", model, *SHORT, *flags)
    assert run.returncode == 0, run.output[-3000:]
    assert json.loads((run.save_dir / "modeling" / "config.json").read_text())["pad_token_id"] == 1
    before, after = load(training_inputs.model).state_dict(), load(run.save_dir / "modeling").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}
    name = "model.embed_tokens.weight"
    assert (after[name] - before[name])[1].abs().max() > 1e-4, "more than weight decay alone"
    shards = list((run.save_dir / "epoch-0_step-3" / "optimizer").glob("*.safetensors"))
    from safetensors import safe_open

    names = {key.split("/")[0] for shard in shards for key in safe_open(shard, "pt").keys()}  # noqa: SIM118
    assert names == changed, "optimizer state only for what trains"


def test_lora_is_saved_as_an_adapter_or_merged(tmp_path, training_inputs):
    from peft import PeftModel

    lora = ["--lora_rank", 4, *ZERO2]
    adapter = train(tmp_path / "adapter", 2, *training_inputs.flags(), *SHORT, *lora)
    merged = train(tmp_path / "merged", 2, *training_inputs.flags(), *SHORT, *lora, "--merge_lora")
    assert adapter.returncode == merged.returncode == 0, adapter.output[-2000:] + merged.output[-2000:]
    assert adapter.losses() == merged.losses()
    base = load(training_inputs.model).to(torch.bfloat16)
    peft_model = PeftModel.from_pretrained(base, adapter.save_dir / "modeling")
    expected = peft_model.merge_and_unload().state_dict()
    found = load(merged.save_dir / "modeling").state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=1e-2, atol=1e-4)
    before = load(training_inputs.model).state_dict()
    changed = [name for name in found if not torch.equal(found[name], before[name].to(torch.bfloat16))]
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.parametrize("merge", [False, True])
def test_lora_and_neftune_with_the_3d_plugin(merge, tmp_path, training_inputs):
    """The plugin pads the vocabulary, and numbers its ranks with numpy's integers."""
    lora = ["--plugin", "3d", "--mixed_precision", "bf16", "--use_neft", "--lora_rank", 4]
    run = train(tmp_path, 1, *training_inputs.flags(), *SHORT, *lora, "--merge_lora", merge)
    assert run.returncode == 0, run.output[-3000:]
    directory = run.save_dir / "modeling"
    if merge:
        shapes = {name: tensor.shape for name, tensor in load(training_inputs.model).state_dict().items()}
        assert {name: tensor.shape for name, tensor in load(directory).state_dict().items()} == shapes
    else:
        assert (directory / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("layout", [["--tp", 2], ["--pp", 2]])
def test_neftune_is_the_same_on_all_ranks_of_a_model(layout, tmp_path, training_inputs):
    flags = [*training_inputs.flags(), *SHORT, "--mixed_precision", "fp32", "--plugin", "3d", "--use_neft"]
    whole = train(tmp_path / "whole", 1, *flags)
    split = train(tmp_path / "split", 2, *flags, *layout, "--microbatch_size", 2)
    assert whole.returncode == split.returncode == 0, whole.output[-2000:] + split.output[-2000:]
    if "--tp" in layout:
        assert split.losses() == pytest.approx(whole.losses(), rel=1e-5)
    else:  # microbatches draw their noise one after the other
        assert split.losses() == pytest.approx(whole.losses(), rel=1e-2)


def test_lora_starts_from_the_same_adapters_on_every_rank(tmp_path, training_inputs):
    """B is zero at first, so the gradient of A is too: after one step without decay A is as it was drawn."""
    from safetensors.torch import load_file

    flags = [*training_inputs.flags(), *SHORT, *DDP, "--lora_rank", 4, "--max_steps", 1, "--weight_decay", 0]
    runs = [train(tmp_path / str(num_processes), num_processes, *flags) for num_processes in (1, 2)]
    drawn = []
    for run in runs:
        assert run.returncode == 0, run.output[-2000:]
        adapter = load_file(run.save_dir / "modeling" / "adapter_model.safetensors")
        drawn.append({name: tensor for name, tensor in adapter.items() if "lora_A" in name})
    assert drawn[0]
    assert all(torch.equal(tensor, drawn[1][name]) for name, tensor in drawn[0].items())


def test_tied_embeddings_train_the_same_in_every_layout(tmp_path, training_inputs):
    """LLaMA-3.2 shares input and output embeddings; under pipelines they live on two stages."""
    flags = training_inputs.with_tied_model(tmp_path / "tied").flags()
    flags += ["--eval_dataset", training_inputs.data / "part-00002", "--eval_interval", 1]
    plain = train(tmp_path / "ddp", 1, *flags, *SHORT, *DDP)
    assert plain.returncode == 0, plain.output[-3000:]
    expected = load(plain.save_dir / "modeling").state_dict()
    for layout in (["--tp", 2], ["--pp", 2, "--zero_stage", 0]):
        flags_3d = ["--plugin", "3d", *layout, "--mixed_precision", "fp32"]
        run = train(tmp_path / layout[0], 2, *flags, *SHORT, *flags_3d, "--eval_at_start")
        assert run.returncode == 0, run.output[-3000:]
        assert run.losses() == pytest.approx(plain.losses(), rel=1e-5)
        first, *records = run.metrics()
        assert (first["step"], "loss" in first) == (0, False)
        assert first["eval_bits_per_byte"] > records[-1]["eval_bits_per_byte"]
        for name in ("eval_loss", "eval_bits_per_byte"):
            evaluated = [[record[name] for record in each] for each in (records, plain.metrics())]
            assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5)
        found = load(run.save_dir / "modeling").state_dict()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_evaluation_is_the_token_mean_over_all_rows(tmp_path, training_inputs):
    part, other = (tmp_path / "sets" / name / "arrow" / "part-00000" for name in ("zh", "en"))
    shutil.copytree(training_inputs.data / "part-00002", part)
    shutil.copytree(training_inputs.data / "part-00001", other)
    evaluated = ["--eval_dataset", part, other.parent, "--eval_interval", 2]
    frozen = ["--lr", 0]
    run = train(tmp_path, 2, *training_inputs.flags(), *SHORT, *DDP, *evaluated, *frozen)
    assert run.returncode == 0, run.output[-3000:]
    records = [record for record in run.metrics() if "eval_loss" in record]
    assert [record["step"] for record in records] == [2, 3]
    names = {name.rpartition("/")[2] for name in records[0] if name.startswith("eval_bits_per_byte/")}
    assert names == {"zh", "en"}
    import datasets

    model, loss_sum, count = load(training_inputs.model), 0.0, 0
    for row in datasets.load_from_disk(str(part)):
        start = 0
        for length in row["document_lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])[None]
            labels = torch.tensor(row["labels"][start : start + length])[None, 1:]
            start += length
            with torch.no_grad():
                logits = model(ids).logits[0, :-1]
            loss_sum += float(
                torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=-100, reduction="sum")
            )
            count += int((labels != -100).sum())
    assert math.isclose(records[0]["eval_loss/zh"], loss_sum / count, rel_tol=1e-5)
    assert math.isclose(records[0]["eval_perplexity"], math.exp(records[0]["eval_loss"]), rel_tol=1e-6)


def test_weights_alone_start_a_new_stage(tmp_path, training_inputs):
    """A `modeling/` directory, whatever its path, gives weights and a fresh optimizer."""
    first = train(tmp_path / "checkpoint_modeling", 1, *training_inputs.flags(), *SHORT, *DDP)
    assert first.returncode == 0, first.output[-3000:]
    weights = tmp_path / "renamed"
    (first.save_dir / "modeling").rename(weights)
    second = train(
        tmp_path / "second", 1, *training_inputs.flags(), *SHORT, *DDP, "--load_checkpoint", weights
    )
    assert second.returncode == 0, second.output[-3000:]
    assert second.metrics()[0]["step"] == 1
    # The same rows again, from weights that have seen them.
    assert second.losses()[0] < first.losses()[0] - 0.05


def test_bins_and_weights_of_the_original_are_taken(tmp_path, training_inputs):
    """Bins without document_lengths, int64; `modeling/` as .bin shards without a tokenizer."""
    import datasets

    ours = datasets.load_from_disk(str(training_inputs.data / "part-00000"))
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in ours]
    features = datasets.Features({name: datasets.Sequence(datasets.Value("int64")) for name in rows[0]})
    old_bins = tmp_path / "old" / "part-00000"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(old_bins))
    old_weights = tmp_path / "old" / "modeling"
    load(training_inputs.model).save_pretrained(old_weights, safe_serialization=False, max_shard_size="300KB")
    assert list(old_weights.glob("*.bin.index.json"))
    flags = ["--pretrained", training_inputs.model, "--dataset", old_bins, "--max_length", 96, *SHORT, *DDP]
    refused = train(tmp_path / "refused", 1, *flags)
    assert refused.returncode != 0
    assert "--no-isolate_documents" in refused.output
    run = train(tmp_path / "taken", 1, *flags, "--no-isolate_documents", "--load_checkpoint", old_weights)
    assert run.returncode == 0, run.output[-3000:]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_rows(tmp_path, training_inputs):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(training_inputs.model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    flags = training_inputs.flags()
    flags[1] = str(broken)
    run = train(tmp_path / "run", 1, *flags, *SHORT, *DDP)
    assert run.returncode != 0
    assert "step 1: the loss is nan (rank 0, rows: " in run.output
    assert "part-0000" in run.output
    assert not list(run.save_dir.glob("epoch-*"))
    assert not (run.save_dir / "modeling").exists()


def run_plain(*arguments: object, **extra: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
        env={**environment(), **extra},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_dry_run_plans_seven_billion_parameters_on_64_gpus(tmp_path, training_inputs):
    """One process without a GPU; for the speed of a shape, the model directory needs no weights."""
    config = json.loads((training_inputs.model / "config.json").read_text())
    config.update(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
    )
    large = tmp_path / "7b"
    large.mkdir()
    for path in training_inputs.model.iterdir():
        if not path.name.startswith("model"):
            (large / path.name).write_bytes(path.read_bytes())
    (large / "config.json").write_text(json.dumps(config))
    data = ["--benchmark", "--max_length", 96, "--accumulation_steps", 1]
    finished = run_plain("--pretrained", large, *data, "--dry_run", "--plugin", "gemini", WORLD_SIZE="64")
    assert finished.returncode == 0, finished.stderr
    assert "64" in finished.stdout
    layout = ["--plugin", "3d", "--tp", 3, "--pp", 5, "--batch_size", 5]
    wrong = run_plain("--pretrained", large, *data, "--dry_run", *layout, WORLD_SIZE="64")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr
    assert "--tp 3" in wrong.stderr


def test_one_rank_alone_prints_the_plan(training_inputs):
    flags = [*training_inputs.flags(), "--plugin", "ddp", "--dry_run"]
    for rank, printed in (("0", True), ("1", False)):
        finished = run_plain(*flags, WORLD_SIZE="2", RANK=rank)
        assert finished.returncode == 0, finished.stderr
        assert ("steps of the schedule" in finished.stdout) == printed


def test_a_world_without_a_rank_is_refused_at_once(training_inputs):
    finished = run_plain(*training_inputs.flags(), "--plugin", "ddp", WORLD_SIZE="8")
    assert finished.returncode == 2
    assert "WORLD_SIZE 8" in finished.stderr
    assert "torchrun" in finished.stderr


def test_dropout_that_would_not_be_applied_is_refused(tmp_path, training_inputs):
    model = tmp_path / "model"
    shutil.copytree(training_inputs.model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    finished = run_plain(*training_inputs.flags(), "--pretrained", model, "--plugin", "ddp", "--dry_run")
    assert finished.returncode == 2
    assert "attention_dropout 0.1" in finished.stderr


def test_gemini_on_a_cpu_is_refused_with_the_alternative(training_inputs):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here, where Gemini works")
    finished = run_plain(*training_inputs.flags(), "--plugin", "gemini")
    assert finished.returncode == 2
    assert "zero2" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_benchmark_reports_speed_and_saves_nothing(tmp_path, training_inputs):
    flags = ["--pretrained", training_inputs.model, "--max_length", 64, "--benchmark", "--num_samples", 40]
    run = train(tmp_path, 2, *flags, *ZERO2, "--batch_size", 2, "--accumulation_steps", 1)
    assert run.returncode == 0, run.output[-3000:]
    assert "tokens/s" in run.output
    assert not (run.save_dir / "modeling").exists()


def test_benchmark_finds_weights_in_bin_files(tmp_path, training_inputs):
    old = tmp_path / "old"
    load(training_inputs.model).save_pretrained(old, safe_serialization=False)
    flags = ["--pretrained", old, "--max_length", 64, "--benchmark", "--num_samples", 40]
    run = train(tmp_path, 1, *flags, *DDP, "--accumulation_steps", 1)
    assert run.returncode == 0, run.output[-3000:]
    assert "has no weights" not in run.output


def test_rows_without_loss_are_reported(tmp_path, training_inputs):
    """Earlier versions left such rows: the end of a document that was a token longer than a row."""
    import datasets

    rows = {"input_ids": [[2]] * 4, "labels": [[2]] * 4, "document_lengths": [[1]] * 4}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "data" / "part-00000"))
    flags = ["--pretrained", training_inputs.model, "--dataset", tmp_path / "data", "--max_length", 96]
    flags += [
        "--eval_dataset",
        tmp_path / "data",
        *DDP,
        "--max_steps",
        2,
        "--accumulation_steps",
        2,
        "--save_interval",
        0,
    ]
    run = train(tmp_path, 1, *flags)
    assert run.returncode == 0, run.output[-3000:]
    assert run.output.count("no token of its rows has loss") == 1
    assert "no token of it has loss; it has no evaluation loss" in run.output
    assert "steps without loss" in run.output
    metrics = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2
    assert not any({"loss", "eval_loss"} & set(record) for record in metrics)
