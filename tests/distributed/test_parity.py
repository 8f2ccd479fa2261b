"""Every layout against one plain fp32 loop in one process: transformers' model and torch's AdamW."""

from __future__ import annotations

import pytest
from parity import BF16, FP32, ROWS_PER_STEP, check_parity, rows

FP16 = ["--mixed_precision", "fp16"]
SEQUENCE = ["--enable_sequence_parallelism"]
CHECKPOINTING = ["--use_grad_checkpoint", "--use_flash_attn"]


# Layouts that CI runs; `--run-slow` adds the rest of the matrix.
LAYOUTS = {
    "ddp x1": (1, ["--plugin", "ddp", *rows(8, 1)]),
    "ddp x2, accumulation 4": (2, ["--plugin", "ddp", *rows(1, 4)]),
    "zero2 x2, longest": (2, ["--plugin", "zero2", *rows(2, 2), "--padding_mode", "longest"]),
    "zero2_cpu x2": (2, ["--plugin", "zero2_cpu", *rows(4, 1), *CHECKPOINTING]),
    "3d tp 2, zero 1": (2, ["--plugin", "3d", "--tp", 2, *rows(2, 4)]),
    "3d pp 2": (2, ["--plugin", "3d", "--pp", 2, "--zero_stage", 0, *rows(4, 2), *CHECKPOINTING]),
    "3d tp 2 pp 2": (4, ["--plugin", "3d", "--tp", 2, "--pp", 2, "--microbatch_size", 2, *rows(4, 2)]),
    "3d zero 2": (2, ["--plugin", "3d", "--zero_stage", 2, *rows(2, 2)]),
    "split_gather, zero 2": (
        2,
        ["--plugin", "3d", "--tp", 2, "--zero_stage", 2, *SEQUENCE, "--sp_mode", "split_gather", *rows(2, 4)],
    ),
    "all_to_all": (2, ["--plugin", "3d", "--sp", 2, *SEQUENCE, "--sp_mode", "all_to_all", *rows(4, 2)]),
}

# Gemini knows half precision only.
GEMINI_LAYOUTS = {
    "gemini x2, accumulation 4, bf16": (2, ["--plugin", "gemini", *rows(1, 4)], BF16),
    "gemini_auto x1, recompute, fp16": (1, ["--plugin", "gemini_auto", *rows(8, 1), *CHECKPOINTING], FP16),
}


def full_matrix() -> dict[str, tuple[int, list]]:
    """Every plugin and layout, with and without recomputation, accumulation 1 and 4."""
    matrix = {}
    layouts = {
        "ddp x1": (1, 1, ["--plugin", "ddp"]),
        "ddp x2": (2, 2, ["--plugin", "ddp"]),
        "zero2 x2": (2, 2, ["--plugin", "zero2"]),
        "zero2_cpu x2": (2, 2, ["--plugin", "zero2_cpu"]),
        "3d zero 0 x2": (2, 2, ["--plugin", "3d", "--zero_stage", 0]),
        "3d zero 1 x2": (2, 2, ["--plugin", "3d", "--zero_stage", 1]),
        "3d zero 2 x2": (2, 2, ["--plugin", "3d", "--zero_stage", 2]),
        "3d zero 1 offload x2": (2, 2, ["--plugin", "3d", "--zero_stage", 1, "--zero_cpu_offload"]),
        "tp 2 zero 0": (2, 1, ["--plugin", "3d", "--tp", 2, "--zero_stage", 0]),
        "tp 2 zero 1": (2, 1, ["--plugin", "3d", "--tp", 2, "--zero_stage", 1]),
        "tp 2 zero 2": (2, 1, ["--plugin", "3d", "--tp", 2, "--zero_stage", 2]),
        "tp 2 x dp 2 zero 1": (4, 2, ["--plugin", "3d", "--tp", 2, "--zero_stage", 1]),
        "tp 2 x dp 2 zero 2": (4, 2, ["--plugin", "3d", "--tp", 2, "--zero_stage", 2]),
        "pp 2 zero 0": (2, 1, ["--plugin", "3d", "--pp", 2, "--zero_stage", 0]),
        "pp 2 zero 1": (2, 1, ["--plugin", "3d", "--pp", 2, "--zero_stage", 1]),
        "pp 2 x dp 2 zero 1": (4, 2, ["--plugin", "3d", "--pp", 2, "--zero_stage", 1]),
        "tp 2 pp 2": (4, 1, ["--plugin", "3d", "--tp", 2, "--pp", 2]),
        "gemini x1": (1, 1, ["--plugin", "gemini"]),
        "gemini x2": (2, 2, ["--plugin", "gemini"]),
        "gemini_auto x1": (1, 1, ["--plugin", "gemini_auto"]),
        "gemini_auto x2": (2, 2, ["--plugin", "gemini_auto"]),
    }
    for mode in ("split_gather", "ring"):
        for zero in (0, 1, 2):
            flags = ["--plugin", "3d", "--tp", 2, "--zero_stage", zero, *SEQUENCE, "--sp_mode", mode]
            layouts[f"{mode} zero {zero}"] = (2, 1, flags)
    for zero in (0, 1, 2):
        flags = ["--plugin", "3d", "--sp", 2, "--zero_stage", zero, *SEQUENCE, "--sp_mode", "all_to_all"]
        layouts[f"all_to_all zero {zero}"] = (2, 1, flags)
    for name, (processes, dp, flags) in layouts.items():
        for accumulation in (1, 4):
            for recompute in (False, True):
                batch = ROWS_PER_STEP // dp // accumulation
                if "--pp" in flags and batch < 2:
                    batch, accumulation_here = 2, ROWS_PER_STEP // dp // 2
                else:
                    accumulation_here = accumulation
                label = f"{name}, {batch}x{accumulation_here}" + (", recompute + flash" if recompute else "")
                extra = CHECKPOINTING if recompute else []
                matrix[label] = (processes, [*flags, *rows(batch, accumulation_here), *extra])
    return matrix


@pytest.mark.parametrize("name", LAYOUTS)
def test_fp32_equals_the_plain_loop(name, tmp_path, training_inputs, reference):
    processes, flags = LAYOUTS[name]
    print(name, check_parity(tmp_path, training_inputs, reference, processes, flags, FP32))


@pytest.mark.parametrize("name", ["zero2 x2, longest", "3d tp 2, zero 1", "ddp x2, accumulation 4"])
def test_bf16_stays_close_to_the_plain_loop(name, tmp_path, training_inputs, reference):
    processes, flags = LAYOUTS[name]
    print(name, check_parity(tmp_path, training_inputs, reference, processes, flags, BF16))


def test_fp16_stays_close_to_the_plain_loop(tmp_path, training_inputs, reference):
    processes, flags = LAYOUTS["zero2 x2, longest"]
    print(check_parity(tmp_path, training_inputs, reference, processes, flags, FP16))


@pytest.mark.parametrize("name", GEMINI_LAYOUTS)
def test_gemini_stays_close_to_the_plain_loop(name, tmp_path, training_inputs, reference):
    processes, flags, precision = GEMINI_LAYOUTS[name]
    print(name, check_parity(tmp_path, training_inputs, reference, processes, flags, precision))


def matrix_cells() -> list:
    """(layout, precision) of every cell."""
    return [
        (name, precision)
        for name in full_matrix()
        for precision in (("bf16", "fp16") if name.startswith("gemini") else ("fp32", "bf16"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), matrix_cells())
def test_full_matrix(name, precision, tmp_path, training_inputs, reference):
    processes, flags = full_matrix()[name]
    precision_flags = {"fp32": FP32, "bf16": BF16, "fp16": FP16}[precision]
    print(
        f"| {name} | {precision} |",
        check_parity(tmp_path, training_inputs, reference, processes, flags, precision_flags),
    )
