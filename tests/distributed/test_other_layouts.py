"""A checkpoint of one layout continues on others: at the same row, equal within rounding."""

from __future__ import annotations

import pytest
import torch
from launch import ROOT, train
from test_resume import few_rows, rows

STEPS = 9
COMMON = ["--lr", 1e-3, "--warmup_steps", 2, "--save_interval", 0, "--skip_save_each_epoch"]
FP32 = ["--mixed_precision", "fp32"]
SMALL_FILES = ROOT / "tests" / "distributed" / "small_files_train.py"


def load(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).state_dict()


def continue_over(directory, layouts: list, flags: list, whole, tolerance: float = 2e-6) -> None:
    """Runs each layout for a few steps of the same run and compares the whole with an unbroken one."""
    for number, (last_step, processes, layout) in enumerate(layouts):
        run = train(
            directory,
            processes,
            *flags,
            *layout,
            *("--max_steps", last_step, "--load_checkpoint", "latest"),
            script=SMALL_FILES,
        )
        assert run.returncode == 0, run.output[-3000:]
        assert ("The layout has changed" in run.output) == (number > 0), run.output[-3000:]
    assert [record["step"] for record in run.metrics()] == list(range(1, STEPS + 1))
    for ours, expected in zip(run.metrics(), whole.metrics(), strict=True):
        assert ours["tokens"] == expected["tokens"]
        assert ours["lr"] == expected["lr"]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)
    found, expected = load(run.save_dir / "modeling"), load(whole.save_dir / "modeling")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2.5 * tolerance)


def test_a_run_wanders_over_layouts(tmp_path, training_inputs):
    flags = [*few_rows(training_inputs), *COMMON, *FP32, "--num_epochs", 2]
    whole = train(tmp_path / "whole", 1, *flags, "--plugin", "ddp", *rows(8, 3), "--max_steps", STEPS)
    assert whole.returncode == 0, whole.output[-3000:]
    layouts = [
        (2, 2, ["--plugin", "zero2", *rows(4, 3)]),
        (4, 4, ["--plugin", "3d", "--tp", 2, "--pp", 2, "--microbatch_size", 4, *rows(8, 3)]),
        (6, 1, ["--plugin", "ddp", *rows(8, 3)]),
        (STEPS, 2, ["--plugin", "3d", "--tp", 2, "--zero_stage", 2, *rows(8, 3)]),
    ]
    continue_over(tmp_path / "parts", layouts, flags, whole)
    # Both processes of zero2 wrote some of the weights.
    weights = list((tmp_path / "parts" / "checkpoints" / "epoch-0_step-2" / "modeling").glob("model-*-of-*"))
    assert len(weights) > 1


@pytest.mark.slow
@pytest.mark.parametrize("first", [["--pp", 2, "--zero_stage", 0], ["--tp", 2], ["--zero_stage", 1]])
@pytest.mark.parametrize("second", ["zero2", "zero2_cpu", "3d pp", "ddp"])
def test_tied_embeddings_wander_too(first, second, tmp_path, training_inputs):
    tied = training_inputs.with_tied_model(tmp_path / "tied")
    flags = [*few_rows(tied), *COMMON, *FP32, "--num_epochs", 2]
    whole = train(tmp_path / "whole", 1, *flags, "--plugin", "ddp", *rows(8, 3), "--max_steps", STEPS)
    assert whole.returncode == 0, whole.output[-3000:]
    dp = 2 if "--zero_stage" in first and "--pp" not in first else 1
    layouts = [
        (4, 2, ["--plugin", "3d", *first, *rows(8 // dp, 3)]),
        {
            "zero2": (STEPS, 2, ["--plugin", "zero2", *rows(4, 3)]),
            "zero2_cpu": (STEPS, 2, ["--plugin", "zero2_cpu", *rows(4, 3)]),
            "3d pp": (STEPS, 2, ["--plugin", "3d", "--pp", 2, "--microbatch_size", 2, *rows(8, 3)]),
            "ddp": (STEPS, 3, ["--plugin", "ddp", *rows(8, 1)]),
        }[second],
    ]
    if layouts[0][2][:4] == layouts[1][2][:4]:
        pytest.skip("the same layout twice")
    continue_over(tmp_path / "parts", layouts, flags, whole)


@pytest.mark.slow
def test_gemini_wanders_too(tmp_path, training_inputs):
    """In bf16, which it knows: losses within the rounding of the layouts that wrote them."""
    flags = [*few_rows(training_inputs), *COMMON, "--mixed_precision", "bf16", "--num_epochs", 2]
    whole = train(tmp_path / "whole", 2, *flags, "--plugin", "zero2", *rows(4, 3), "--max_steps", STEPS)
    assert whole.returncode == 0, whole.output[-3000:]
    layouts = [
        (2, 2, ["--plugin", "gemini", *rows(4, 3)]),
        (4, 2, ["--plugin", "3d", "--tp", 2, *rows(8, 3)]),
        (5, 3, ["--plugin", "gemini_auto", *rows(8, 1)]),
        (7, 1, ["--plugin", "gemini_auto", *rows(8, 3)]),
        (8, 2, ["--plugin", "zero2_cpu", *rows(4, 3)]),
        (STEPS, 4, ["--plugin", "gemini", *rows(6, 1)]),
    ]
    continue_over(tmp_path / "parts", layouts, flags, whole, tolerance=2e-3)
    weights = list((tmp_path / "parts" / "checkpoints" / "epoch-0_step-2" / "modeling").glob("model-*-of-*"))
    assert len(weights) > 1, "both processes of gemini wrote some"


def test_steps_of_another_size_continue_at_the_same_row(tmp_path, training_inputs):
    """fp16, for the loss scale to be carried over: 16 rows a step on two processes, then 4 on one; with the
    largest seed, from which others are made.
    """
    flags = [*few_rows(training_inputs), *COMMON, "--mixed_precision", "fp16", "--num_epochs", 1]
    flags += ["--seed", 2**31 - 1]
    first = train(tmp_path, 2, *flags, "--plugin", "zero2", *rows(4, 2), "--max_steps", 3)
    assert first.returncode == 0, first.output[-3000:]
    metrics = first.metrics()
    second = train(tmp_path, 1, *flags, "--plugin", "ddp", *rows(4, 1), "--load_checkpoint", "latest")
    assert second.returncode == 0, second.output[-3000:]
    assert "A step has 4 rows instead of 16" in second.output
    assert "row 48" in second.output
    import datasets

    num_rows = len(datasets.load_from_disk(str(training_inputs.data / "part-00000")))
    more = second.metrics()
    assert more[:3] == metrics
    assert len(more) == 3 + (num_rows - 48) // 4
    # The cosine goes on where it was, and ends at a tenth of the peak's neighbourhood.
    assert more[3]["lr"] == pytest.approx(metrics[-1]["lr"], rel=0.2)
    assert more[-1]["lr"] < 1.2e-4
    assert more[3]["loss_scale"] == metrics[-1]["loss_scale"]
    assert more[3]["loss"] < metrics[0]["loss"]
