"""Canaries of colossalai and of gloo, and their cures, all looked at in one run on two processes."""

from __future__ import annotations

import json

import pytest
from canaries import canary, expect_right, run_processes

# Function in defects.py -> where its cure is, and how the defect shows.
DEFECTS = {
    "reduce_scatter_on_gloo": ("gloo_collectives", "does not support reduce_scatter"),
    "all_to_all_on_gloo": ("gloo_collectives", "does not support alltoall"),
    "cpu_accelerator": ("cpu_accelerator", "raises: .*synchronize"),
    "pipeline_names": ("pipeline_p2p_names", "has no attribute 'HCCL'|is_hccl_available"),
    "zero_on_a_cpu": ("zero_device_check", "device is required"),
    "adam_without_a_compiler": ("training/plugins/base.py", "No usable kernel found for CPUAdamLoader"),
    "launcher_quotes_arguments": ("launch/environment.py", "--dataset two words"),
    "pickled_code": ("pickled_code", "code ran"),
    "zero_with_an_empty_group": ("empty_parameter_groups", "IndexError"),
    "norm_of_an_empty_group": ("empty_parameter_groups", "takes no part"),
    "zero_beside_ddp": ("zero_beside_ddp", "gradients off"),
    "norm_without_clipping": ("training/plugins/base.py", "norm None"),
    "growing_loss_scale": ("loss_scale", "scaled by 8.0, divided by 16.0"),
    "ddp_without_mixed_precision": ("training/plugins/ddp.py", "supports"),
    "zero_in_fp32": ("zero_fp32", "Please set precision to"),
    "norms_without_apex": ("training/plugins/base.py", "'NoneType' object is not callable"),
    "rotary_frequencies": ("rotary_frequencies", "torch.bfloat16"),
    "masters_in_a_checkpoint": ("training/checkpoint/optimizer_files.py", "masters changed"),
    "future_under_sequence_parallelism": ("training/llama/attention.py", "earlier tokens change"),
    "ring_gradients": ("ring_sequence_parallelism", "gradients off"),
    "accumulated_norm_gradients": ("split_gather_gradients", "gradients off"),
    "padded_vocabulary_model": ("training/checkpoint/modeling_files.py", "_unpad_detach"),
    "padded_vocabulary_optimizer": ("training/checkpoint/optimizer_files.py", "isn't evenly distributed"),
    "gemini_on_a_cpu": ("gemini_on_cpu", "AssertionError: $"),
    "torch_adam_for_gemini": ("gemini_adam", "in the available list"),
    "step_after_an_overflow": ("gemini_skipped_step", r"overflows: \[False, True, True\]"),
    "samples_after_an_evaluation": ("gemini_memory_samples", "the next sample is number"),
    "mode_of_a_wrapped_model": ("gemini_training_mode", r"modes: \[\(False, True, False\)"),
    "evaluation_before_training": ("training/plugins/gemini.py", "run a completed iteration"),
    "exported_weights": ("training/plugins/gemini.py", "weights are as before the step"),
}
CURED = (
    "reduce_scatter_on_gloo",
    "all_to_all_on_gloo",
    "cpu_accelerator",
    "pipeline_names",
    "zero_on_a_cpu",
    "pickled_code",
    "zero_with_an_empty_group",
    "norm_of_an_empty_group",
    "zero_beside_ddp",
    "growing_loss_scale",
    "zero_in_fp32",
    "future_under_sequence_parallelism",
    "ring_gradients",
    "accumulated_norm_gradients",
    "gemini_on_a_cpu",
    "torch_adam_for_gemini",
    "step_after_an_overflow",
    "samples_after_an_evaluation",
    "mode_of_a_wrapped_model",
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("defects")
    run_processes("defects.py", 2, str(directory))
    return json.loads((directory / "outcomes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("defect", "symptom"),
    [
        pytest.param(defect, symptom, marks=canary(f"colossalai 0.5.0 on torch 2.5.1: {place}"), id=defect)
        for defect, (place, symptom) in DEFECTS.items()
    ],
)
def test_without_a_cure(defect: str, symptom: str, outcomes: dict[str, str]) -> None:
    expect_right(outcomes[defect], symptom)


@pytest.mark.parametrize("defect", CURED)
def test_cured(defect: str, outcomes: dict[str, str]) -> None:
    assert outcomes[f"{defect} cured"] == "right"


def test_every_outcome_is_looked_at(outcomes: dict[str, str]) -> None:
    assert outcomes.keys() == {*DEFECTS, *(f"{name} cured" for name in CURED)}
