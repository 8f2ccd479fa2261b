"""New rows alone, and parameter groups, in real layouts: compared with plain loops, stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adaptation_parity import (
    EMBEDDINGS,
    LR_EMBEDDINGS,
    NEW_IDS,
    PlainLoop,
    Reference,
    extended,
    load_weights,
    run_extended,
    with_four_layers,
    without_decay,
)
from launch import Run
from safetensors import safe_open
from training_inputs import TrainingInputs

NEW_ROWS = ["--freeze_non_embeds_params", "new_rows"]
GROUPS = ["--lr_embeddings", LR_EMBEDDINGS, "--no_decay", "embeddings", "norms"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of losses, gradient norms and weights, against a loop in fp32.
HALF = {"loss": 1e-3, "norm": 1e-2, "weights": 2e-2}


def rows(batch: int, accumulation: int) -> list:
    return ["--batch_size", batch, "--accumulation_steps", accumulation]


def layout(zero_stage: int, *flags: object) -> list:
    return ["--plugin", "3d", "--zero_stage", zero_stage, *flags, *rows(4, 2)]


@pytest.fixture(scope="session")
def untied(training_inputs, tmp_path_factory) -> TrainingInputs:
    return extended(training_inputs, tmp_path_factory.mktemp("untied") / "model")


@pytest.fixture(scope="session")
def tied(training_inputs, tmp_path_factory) -> TrainingInputs:
    return extended(training_inputs, tmp_path_factory.mktemp("tied") / "model", tied=True)


@pytest.fixture(scope="session")
def deep(training_inputs, tmp_path_factory) -> TrainingInputs:
    """A model for four stages."""
    return with_four_layers(extended(training_inputs, tmp_path_factory.mktemp("deep") / "model"))


@pytest.fixture(scope="session")
def new_rows_untied(untied) -> Reference:
    return Reference.of(PlainLoop(untied, new_rows=True))


@pytest.fixture(scope="session")
def new_rows_tied(tied) -> Reference:
    return Reference.of(PlainLoop(tied, new_rows=True))


@pytest.fixture(scope="session")
def groups_untied(untied) -> Reference:
    return Reference.of(PlainLoop(untied, lr_embeddings=LR_EMBEDDINGS, no_decay=("norms", "embeddings")))


def assert_only_new_rows_moved(
    directory: Path, source: Path, dtype: torch.dtype, at_least: float = 0.9
) -> None:
    """Every other value is the source's in the dtype of the run, bit for bit.

    Args:
        at_least: share of the new rows that have changed: those in the data, and what enough decay changes.
    """
    before, after = load_weights(source), load_weights(directory)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        kept, wanted = tensor.clone(), before[name].to(dtype)
        if name in EMBEDDINGS:
            new = slice(NEW_IDS.start, NEW_IDS.stop)
            assert (kept[new] != wanted[new]).any(dim=1).float().mean() > at_least, name
            kept[new] = wanted[new]
        assert torch.equal(kept.view(torch.uint8), wanted.view(torch.uint8)), name


def assert_old_rows_have_no_moments(checkpoint: Path, vocabulary: int = 501, width: int = 64) -> None:
    names: set[str] = set()
    whole: dict[str, list[torch.Tensor]] = {}
    for path in sorted((checkpoint / "optimizer").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                name, kind = key.rsplit("/", 1)
                names.add(name)
                if kind != "master":
                    whole.setdefault(key, []).append(file.get_tensor(key).flatten())
    assert names <= set(EMBEDDINGS)
    for key, slices in whole.items():
        matrix = torch.cat(slices)[: vocabulary * width].view(vocabulary, width)
        assert not matrix[: NEW_IDS.start].any(), key
        assert not matrix[NEW_IDS.stop :].any(), key
        assert matrix[NEW_IDS.start : NEW_IDS.stop].any(), key


def check_new_rows(run: Run, reference: Reference, precision: str, plugin: str = "") -> None:
    print(reference.compare(run, **({} if precision == "fp32" else HALF)))
    dtype = torch.float32 if plugin == "ddp" else DTYPES[precision]
    assert_only_new_rows_moved(run.save_dir / "modeling", reference.loop.inputs.model, dtype)
    (checkpoint,) = run.save_dir.glob("epoch-*")
    if "pp" not in plugin:  # two stages have a part each of a tied matrix's shards
        assert_old_rows_have_no_moments(checkpoint)


def test_decay_shows_in_what_is_compared(new_rows_untied):
    without = without_decay(new_rows_untied.loop)
    for name in EMBEDDINGS:
        assert (without[name] - new_rows_untied.weights[name]).abs().max() > 1e-4


def test_new_rows_alone_in_fp16_with_a_split_vocabulary(tmp_path, new_rows_tied):
    """One tied matrix, padded and split by rows, gradients sliced by ZeRO; clipped and accumulated."""
    flags = layout(2, "--tp", 2)
    run = run_extended(tmp_path, new_rows_tied.loop.inputs, 2, *NEW_ROWS, *flags, precision="fp16")
    check_new_rows(run, new_rows_tied, "fp16")


def test_groups_in_a_pipeline(tmp_path, groups_untied):
    run = run_extended(tmp_path, groups_untied.loop.inputs, 2, *GROUPS, *layout(1, "--pp", 2))
    print(groups_untied.compare(run))
    first = run.metrics()[0]
    assert first["lr_embeddings"] == pytest.approx(first["lr"] * 4)


LAYOUTS = {
    "ddp": (2, ["--plugin", "ddp", *rows(2, 2)]),
    "zero2": (2, ["--plugin", "zero2", *rows(2, 2)]),
    "zero2_cpu": (2, ["--plugin", "zero2_cpu", *rows(2, 2)]),
    "tp 2 zero 0": (2, layout(0, "--tp", 2)),
    "tp 2 zero 1": (2, layout(1, "--tp", 2)),
    "tp 2 zero 2": (2, layout(2, "--tp", 2)),
    "pp 2 zero 0": (2, layout(0, "--pp", 2)),
    "pp 2 zero 1": (2, layout(1, "--pp", 2)),
    "zero 2": (1, layout(2)),
    "gemini": (2, ["--plugin", "gemini", *rows(2, 2)]),
    "gemini_auto": (2, ["--plugin", "gemini_auto", *rows(4, 1)]),
}


def precisions(name: str) -> list[str]:
    """Those that a layout knows."""
    return [each for each in DTYPES if each != "fp32" or "gemini" not in name]


@pytest.mark.slow  # 62 runs of two processes; the default tests have one layout of each kind
@pytest.mark.parametrize("model", ["untied", "tied"])
@pytest.mark.parametrize(("name", "precision"), [(name, p) for name in LAYOUTS for p in precisions(name)])
def test_new_rows_in_every_layout(name, model, precision, tmp_path, request):
    reference = request.getfixturevalue(f"new_rows_{model}")
    processes, flags = LAYOUTS[name]
    run = run_extended(tmp_path, reference.loop.inputs, processes, *NEW_ROWS, *flags, precision=precision)
    check_new_rows(run, reference, precision, name)


@pytest.mark.slow  # 11 runs of two processes
@pytest.mark.parametrize("name", LAYOUTS)
def test_groups_in_every_layout(name, tmp_path, groups_untied):
    processes, flags = LAYOUTS[name]
    precision = precisions(name)[0]
    run = run_extended(tmp_path, groups_untied.loop.inputs, processes, *GROUPS, *flags, precision=precision)
    print(groups_untied.compare(run, **({} if precision == "fp32" else HALF)))


@pytest.mark.slow  # runs of four processes
@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("kind", ["groups", "embeddings", "new rows"])
def test_stages_without_parameters_of_a_group(kind, zero_stage, tmp_path, deep):
    """The middle two of four have no embeddings, and where those alone train nothing to train."""
    loop, flags = {
        "groups": (PlainLoop(deep, lr_embeddings=LR_EMBEDDINGS, no_decay=("norms", "embeddings")), GROUPS),
        "embeddings": (PlainLoop(deep, embeddings=True), ["--freeze_non_embeds_params"]),
        "new rows": (PlainLoop(deep, new_rows=True), NEW_ROWS),
    }[kind]
    reference = Reference.of(loop)
    run = run_extended(tmp_path, deep, 4, *flags, *layout(zero_stage, "--pp", 4))
    print(reference.compare(run))


@pytest.mark.slow  # six runs
@pytest.mark.parametrize("what", [NEW_ROWS, GROUPS], ids=["new rows", "groups"])
def test_resumed_runs_are_the_run_that_never_stopped(what, tmp_path, untied):
    """Bit for bit on the same layout; on another one within rounding, but old rows bit for bit there too."""
    zero2 = ["--plugin", "zero2", *rows(2, 2)]
    whole = run_extended(tmp_path / "whole", untied, 2, *what, *zero2, "--save_interval", 3, precision="fp16")
    assert whole.returncode == 0, whole.output[-3000:]
    resume = ["--load_checkpoint", whole.save_dir / "epoch-0_step-3", "--save_interval", 0]
    same = run_extended(tmp_path / "same", untied, 2, *what, *zero2, *resume, precision="fp16")
    assert same.returncode == 0, same.output[-3000:]
    assert same.losses() == whole.losses()[3:]
    final = load_weights(whole.save_dir / "modeling")
    for name, tensor in load_weights(same.save_dir / "modeling").items():
        assert torch.equal(tensor, final[name]), name
    other = run_extended(
        tmp_path / "other", untied, 2, *what, *layout(1, "--tp", 2), *resume, precision="fp16"
    )
    assert other.returncode == 0, other.output[-3000:]
    assert other.losses() == pytest.approx(whole.losses()[3:], rel=1e-3)
    if what is NEW_ROWS:
        for run in (same, other):
            assert_only_new_rows_moved(run.save_dir / "modeling", untied.model, torch.float16)
