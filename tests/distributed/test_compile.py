"""`--compile`: the losses of an uncompiled run, few graphs, weights by their usual names, exact resume."""

from __future__ import annotations

import pytest
from launch import Run, train
from safetensors import safe_open
from test_resume import COMMON, assert_same_run, few_rows, rows

# A compiler's minutes, and runs to compare with.
pytestmark = pytest.mark.slow

STEPS = 6
ZERO2 = ["--plugin", "zero2", "--mixed_precision", "bf16", *rows(4, 3)]
# Name -> processes, flags, largest relative difference of a loss.
CASES = {
    # Rows of every length, and a batch of the evaluation that is smaller than the others.
    "ddp fp32, lengths vary": (
        1,
        [*("--plugin", "ddp", "--mixed_precision", "fp32", "--padding_mode", "longest"), *rows(7, 3)],
        1e-5,
    ),
    "zero2_cpu fp16, recompute": (
        2,
        ["--plugin", "zero2_cpu", "--mixed_precision", "fp16", "--use_grad_checkpoint", *rows(4, 3)],
        2e-3,
    ),
    "LoRA with dropout": (
        1,
        [
            *("--plugin", "zero2", "--mixed_precision", "fp32", *rows(4, 3)),
            *("--lora_rank", 4, "--lora_embeddings", "train", "--merge_lora"),
        ],
        1e-5,
    ),
}


def run_both(directory, processes: int, flags: list) -> tuple[Run, Run]:
    flags = [*flags, "--max_steps", STEPS]
    plain = train(directory / "plain", processes, *flags)
    assert plain.returncode == 0, plain.output[-3000:]
    compiled = train(directory / "compiled", processes, *flags, "--compile", timeout=600)
    assert compiled.returncode == 0, compiled.output[-3000:]
    check_same_training(compiled, plain)
    return plain, compiled


def check_same_training(compiled: Run, plain: Run) -> None:
    names = []
    for run in (compiled, plain):
        with safe_open(run.save_dir / "modeling" / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    assert "layers compiled at their first use" in compiled.output
    assert "compiled" not in plain.output
    # Steps that made graphs have no speed; there are few of them.
    slow = [record["step"] for record in compiled.metrics() if "tokens_per_second" not in record]
    assert 1 in slow
    assert len(slow) <= 2
    assert f"steps that compiled {len(slow)}," in " ".join(compiled.output.replace("|", " ").split())
    assert all(f"step {step}: decoder layers were compiled" in compiled.output for step in slow)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_an_uncompiled_run(name, tmp_path, training_inputs):
    processes, flags, tolerance = CASES[name]
    evaluation = ["--eval_dataset", training_inputs.data / "part-00001"]
    plain, compiled = run_both(
        tmp_path, processes, [*few_rows(training_inputs), *COMMON, *flags, *evaluation]
    )
    assert compiled.losses() == pytest.approx(plain.losses(), rel=tolerance)
    last = [run.metrics()[-1]["eval_loss"] for run in (compiled, plain)]
    assert last[0] == pytest.approx(last[1], rel=tolerance)


def test_resume_is_exact(tmp_path, training_inputs):
    everything = [*few_rows(training_inputs), *COMMON, *ZERO2]
    plain, whole = run_both(tmp_path, 2, everything)
    assert whole.losses() == pytest.approx(plain.losses(), rel=2e-3)
    checkpoint = whole.save_dir / "epoch-0_step-4"
    parts = train(tmp_path / "parts", 2, *everything, "--compile", "--max_steps", 4, timeout=600)
    assert parts.returncode == 0, parts.output[-3000:]
    resumed = train(
        tmp_path / "parts",
        2,
        *everything,
        *("--compile", "--max_steps", STEPS, "--load_checkpoint", parts.save_dir / checkpoint.name),
        timeout=600,
    )
    assert resumed.returncode == 0, resumed.output[-3000:]
    assert_same_run(resumed, whole)
