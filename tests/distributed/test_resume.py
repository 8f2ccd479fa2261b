"""A run that is stopped and resumed equals the one that never was, bit for bit on the same layout."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from launch import Run, start, train, wait_for_steps, workers_of

FULL_STEPS = 9
COMMON = [
    "--lr",
    1e-3,
    "--warmup_steps",
    2,
    "--num_epochs",
    2,
    "--save_interval",
    4,
    "--skip_save_each_epoch",
]


def rows(batch: int, accumulation: int) -> list:
    return ["--batch_size", batch, "--accumulation_steps", accumulation]


# Few steps an epoch, so that the second epoch begins before the end.
CASES = {
    "ddp x3, bucketed": (3, ["--plugin", "ddp", "--mixed_precision", "fp32", *rows(8, 2), "--bucketed"]),
    "zero2 bf16, NEFTune": (
        2,
        ["--plugin", "zero2", "--mixed_precision", "bf16", *rows(4, 3), "--use_neft"],
    ),
    "zero2_cpu fp16": (2, ["--plugin", "zero2_cpu", "--mixed_precision", "fp16", *rows(4, 3)]),
    "3d tp 2 pp 2 zero 0 bf16": (
        4,
        [
            *("--plugin", "3d", "--tp", 2, "--pp", 2, "--zero_stage", 0, "--mixed_precision", "bf16"),
            *("--microbatch_size", 4, *rows(8, 3)),
        ],
    ),
    "3d zero 2 bf16": (
        2,
        ["--plugin", "3d", "--zero_stage", 2, "--mixed_precision", "bf16", *rows(4, 3)],
    ),
    "LoRA with dropout, and embeddings": (
        2,
        [
            *("--plugin", "zero2", "--mixed_precision", "bf16", *rows(4, 3)),
            *("--lora_rank", 4, "--lora_embeddings", "train", "--merge_lora"),
        ],
    ),
}
# test_gemini.py resumes in one process group, in a tenth of the time; the parts of tp 2 with
# ZeRO 1 are in the cases above.
SLOW_CASES = {
    "3d tp 2 zero 1 bf16": (
        2,
        ["--plugin", "3d", "--tp", 2, "--mixed_precision", "bf16", *rows(8, 3)],
    ),
    "gemini bf16, NEFTune": (
        2,
        ["--plugin", "gemini", "--mixed_precision", "bf16", *rows(4, 3), "--use_neft"],
    ),
    "gemini fp16, frozen": (
        2,
        ["--plugin", "gemini", "--mixed_precision", "fp16", *rows(12, 1), "--freeze_non_embeds_params"],
    ),
    "gemini_auto fp16, recompute": (
        3,
        ["--plugin", "gemini_auto", "--mixed_precision", "fp16", *rows(4, 2), "--use_grad_checkpoint"],
    ),
}


def few_rows(training_inputs, bucketed: bool = False) -> list[str]:
    """Flags for two small parts when buckets matter, else one: about eight steps an epoch."""
    parts = ["part-00000", "part-00001"] if bucketed else ["part-00000"]
    flags = training_inputs.flags()
    flags[flags.index("--dataset") + 1 : flags.index("--dataset") + 2] = [
        str(training_inputs.data / part) for part in parts
    ]
    return flags


def weights_of(directory: Path) -> dict[str, bytes]:
    """Every weight file of a model directory, as bytes."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def assert_same_run(resumed: Run, whole: Run) -> None:
    for a, b in zip(resumed.metrics(), whole.metrics(), strict=True):
        for key in ("step", "epoch", "tokens", "loss", "lr", "grad_norm"):
            assert a[key] == b[key], (a, b)
    final = weights_of(whole.save_dir / "modeling")
    assert final
    assert weights_of(resumed.save_dir / "modeling") == final


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_resume_is_exact(name, tmp_path, training_inputs):
    processes, flags = (CASES | SLOW_CASES)[name]
    everything = [*few_rows(training_inputs, bucketed="--bucketed" in flags), *COMMON, *flags]
    whole = train(tmp_path / "whole", processes, *everything, "--max_steps", FULL_STEPS)
    assert whole.returncode == 0, whole.output[-3000:]
    assert any(record["epoch"] == 1 for record in whole.metrics()), "the case has to cross an epoch"
    # The run as it was after step 8, in another place; continuing from step 4 has to cut the metrics back.
    parts = tmp_path / "parts"
    shutil.copytree(tmp_path / "whole", parts)
    shutil.rmtree(parts / "checkpoints" / "modeling")
    (later,) = (path.name for path in parts.glob("checkpoints/epoch-*_step-8"))
    for path in parts.glob(f"checkpoints/epoch-*_step-{FULL_STEPS}"):
        shutil.rmtree(path)
    metrics = parts / "logs" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:8]))
    resumed = train(
        parts,
        processes,
        *everything,
        *("--max_steps", FULL_STEPS, "--load_checkpoint", parts / "checkpoints" / "epoch-0_step-4"),
    )
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert f"holds later checkpoints ({later})" in " ".join(resumed.output.split())
    assert_same_run(resumed, whole)


ZERO2 = ["--plugin", "zero2", "--mixed_precision", "bf16", *rows(4, 3)]


def test_kill_minus_nine_at_random_moments(tmp_path, training_inputs, request):
    """Training processes are killed again and again; `latest` leads on, to the same final weights."""
    rounds = 50 if request.config.getoption("--run-slow") else 3
    steps = 4 * rounds
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 1, "--save_total_limit", 2]
    everything += ["--num_epochs", steps // 6 + 1, "--max_steps", steps]
    whole = train(tmp_path / "whole", 2, *everything)
    assert whole.returncode == 0, whole.output[-3000:]
    generator = random.Random(0)
    run, metrics = tmp_path / "killed", tmp_path / "killed" / "logs" / "metrics.jsonl"
    kills = []
    for _ in range(rounds):
        known = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        process = start(run, 2, *everything, "--load_checkpoint", "latest")
        wait_for_steps(run, min(known + generator.randrange(4), steps - 2), process)
        while not (alive := workers_of(process)):
            time.sleep(0.05)
        time.sleep(generator.random() * 0.3)
        victims = alive if generator.random() < 0.7 else alive[:1]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=120)
        found = sorted(int(path.name.split("-")[-1]) for path in (run / "checkpoints").glob("epoch-*"))
        half_written = len(list((run / "checkpoints").glob(".epoch-*")))
        kills.append((len(victims), found, half_written))
    print("(processes killed, checkpoints then, unfinished ones):", json.dumps(kills))
    assert all(count for count, _, _ in kills)
    resumed = train(run, 2, *everything, "--load_checkpoint", "latest")
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert weights_of(run / "checkpoints" / "modeling") == weights_of(whole.save_dir / "modeling")
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in whole.metrics()]
    assert len(list((run / "checkpoints").glob("epoch-*"))) <= 2
    assert not list((run / "checkpoints").glob(".epoch-*"))


def test_damaged_checkpoints_are_found_and_passed_over(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--save_interval", 2, "--max_steps", 4]
    run = train(tmp_path, 2, *everything)
    assert run.returncode == 0, run.output[-3000:]
    newest = run.save_dir / "epoch-0_step-4" / "modeling" / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    (run.save_dir / ".epoch-0_step-9.unfinished").mkdir()
    again = train(tmp_path, 2, *everything, "--load_checkpoint", "latest")
    assert again.returncode == 0, again.output[-3000:]
    assert "has changed since it was written" in again.output
    assert "epoch-0_step-2: step 2" in again.output
    newest.write_bytes(content[:-7])
    named = train(tmp_path, 1, *everything, "--load_checkpoint", newest.parent.parent)
    assert named.returncode != 0
    assert "bytes instead of" in named.output


def test_changed_data_arguments_or_layout_are_named(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2, "--max_steps", 2]
    run = train(tmp_path, 2, *everything)
    assert run.returncode == 0, run.output[-3000:]
    changed = train(
        tmp_path,
        2,
        *everything,
        *("--load_checkpoint", "latest", "--lr", 5e-4, "--dataset", training_inputs.data / "part-00001"),
    )
    assert changed.returncode != 0
    assert "--lr: 0.001 when saved, 0.0005 now" in changed.output
    assert "--dataset: fingerprint" in changed.output
    done = train(tmp_path, 2, *everything, "--load_checkpoint", "latest", "--max_steps", 1)
    assert done.returncode == 0, done.output[-3000:]
    assert "Nothing is left to train: 2 steps are done, and the run ends at 1" in done.output
    used = train(tmp_path, 2, *everything)
    assert used.returncode != 0
    assert "holds 1 checkpoints of an earlier run" in used.output


def test_adapters_go_on_with_the_weights_they_were_trained_on(tmp_path, training_inputs):
    """The base is `--pretrained`, or what `--load_checkpoint` gave when the run began."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(training_inputs.model, other)
    weights = load_file(other / "model.safetensors")
    for name in weights:
        weights[name] = weights[name] * 1.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    lora = [*few_rows(training_inputs), *COMMON, *ZERO2, "--lora_rank", 4]
    on_other = [*lora, "--load_checkpoint", other]
    whole = train(tmp_path / "whole", 1, *on_other, "--max_steps", 5)
    first = train(tmp_path / "parts", 1, *on_other, "--max_steps", 2)
    assert whole.returncode == first.returncode == 0, whole.output[-2000:] + first.output[-2000:]
    for last_step in (3, 5):
        resumed = train(tmp_path / "parts", 1, *lora, "--max_steps", last_step, "--load_checkpoint", "latest")
        assert resumed.returncode == 0, resumed.output[-3000:]
    assert_same_run(resumed, whole)
    swapped = lora.copy()
    swapped[1] = other
    plain = train(tmp_path / "plain", 1, *lora, "--max_steps", 2)
    assert plain.returncode == 0, plain.output[-3000:]
    refused = train(tmp_path / "plain", 1, *swapped, "--max_steps", 3, "--load_checkpoint", "latest")
    assert refused.returncode != 0
    assert f"--pretrained {other}: holds other weights" in refused.output


def test_another_shape_of_the_model_is_named(tmp_path, training_inputs):
    """The weights of a resumed run come from its checkpoint, the configuration from `--pretrained`."""
    flags = [*few_rows(training_inputs), *COMMON, *ZERO2]
    run = train(tmp_path, 1, *flags, "--max_steps", 1)
    assert run.returncode == 0, run.output[-3000:]
    other = tmp_path / "other"
    shutil.copytree(training_inputs.model, other)
    config = json.loads((other / "config.json").read_text())
    before, config["rope_theta"] = config["rope_theta"], 5e5
    (other / "config.json").write_text(json.dumps(config))
    flags[1] = other
    refused = train(tmp_path, 1, *flags, "--max_steps", 2, "--load_checkpoint", "latest")
    assert refused.returncode != 0
    assert f"--pretrained: rope_theta {before} when saved, 500000.0 now" in refused.output
