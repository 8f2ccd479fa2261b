"""Stages of an adaptation as docs/adaptation.md has them: everything at once, in ZeRO and in Gemini.

Mixed sets, new rows, groups with rates of their own, a decay at the end and evaluation of each set; then a
stage that keeps the optimizer, in another plugin.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adaptation_parity import EMBEDDINGS, NEW_IDS, SETS, extended, load_weights, two_sets
from launch import Run, train
from safetensors import safe_open
from test_mixtures import assert_figures_add_up, figures
from test_resume import rows, weights_of
from test_what_trains import assert_old_rows_have_no_moments, assert_only_new_rows_moved
from training_inputs import MAX_LENGTH, TrainingInputs

# Each test is several runs of two processes; parts of them run by default: `test_mixtures.py`,
# `test_stages.py`, `test_what_trains.py`, `test_gemini.py`.
pytestmark = pytest.mark.slow

WIDTH, VOCABULARY = 64, 501
PLUGINS = ("zero2", "gemini", "gemini_auto")
NEW_ROWS = ["--freeze_non_embeds_params", "new_rows"]
# So much decay that in 16 bits it shows in rows that the data does not have.
RATES = ["--lr", 1e-3, "--lr_embeddings", 2e-3, "--warmup_steps", 2, "--weight_decay", 0.5]
WSD = ["--lr_schedule", "wsd", "--decay_start", 2, "--decay_steps", 4, "--min_lr_ratio", 0]


@pytest.fixture(scope="module")
def inputs(training_inputs, tmp_path_factory) -> TrainingInputs:
    return extended(training_inputs, tmp_path_factory.mktemp("extended") / "model")


@pytest.fixture(scope="module")
def sets(training_inputs, tmp_path_factory) -> list[Path]:
    return two_sets(training_inputs, tmp_path_factory.mktemp("sets"))


def run_stage(
    directory: Path, model: Path, sets: list[Path], plugin: str, *flags: object, precision: str = "bf16"
) -> Run:
    """Two processes, 16 rows a step."""
    run = train(
        directory,
        2,
        *("--pretrained", model, "--max_length", MAX_LENGTH, "--dataset", *sets),
        *("--dataset_weights", 3, 1, "--eval_dataset", *sets, "--eval_interval", 3, "--save_interval", 3),
        *("--plugin", plugin, "--mixed_precision", precision, *rows(4, 2), *flags),
    )
    assert run.returncode == 0, run.output[-3000:]
    return run


def whole_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Flattened masters and moments by `name/kind`; for checkpoints of zero2 and of Gemini on two processes.

    A slice of zero2 is padded at the end.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted((checkpoint / "optimizer").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a dict
                found.setdefault(key, []).append(file.get_tensor(key).flatten())
    sizes = {name: tensor.numel() for name, tensor in load_weights(checkpoint / "modeling").items()}
    return {key: torch.cat(parts)[: sizes[key.rsplit("/", 1)[0]]] for key, parts in found.items()}


def assert_close_runs(run: Run, other: Run) -> None:
    """The same rows, to the last token; losses and weights within rounding."""
    for ours, theirs in zip(run.metrics(), other.metrics(), strict=True):
        for key in ("step", "epoch", "tokens", "lr", *(f"tokens/{name}" for name in SETS)):
            assert ours[key] == theirs[key]
        assert ours.get("lr_embeddings") == theirs.get("lr_embeddings")
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if "loss" in key or key == "grad_norm":
                assert value == pytest.approx(theirs[key], rel=2e-2 if key == "grad_norm" else 2e-3), key


@pytest.fixture(scope="module", params=("bf16", "fp16"))
def first_stages(request, inputs, sets, tmp_path_factory) -> tuple[str, dict[str, Run]]:
    """The precision, and new rows alone by plugin."""
    flags = [*NEW_ROWS, *RATES, *WSD, "--no_decay", "norms"]
    precision, runs = request.param, {}
    for plugin in PLUGINS:
        directory = tmp_path_factory.mktemp(plugin)
        runs[plugin] = run_stage(directory, inputs.model, sets, plugin, *flags, precision=precision)
    return precision, runs


@pytest.mark.parametrize("plugin", PLUGINS)
def test_a_stage_of_new_rows_with_everything(plugin, first_stages, inputs, sets, tmp_path):
    precision, runs = first_stages
    run = runs[plugin]
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    assert_close_runs(run, runs["zero2"])
    assert_figures_add_up(run)
    assert_only_new_rows_moved(run.save_dir / "modeling", inputs.model, dtype)
    checkpoint = run.save_dir / "epoch-0_step-3"
    assert_old_rows_have_no_moments(checkpoint, VOCABULARY, WIDTH)
    ends = [record for record in run.metrics() if "eval_loss" in record]
    assert [record["step"] for record in ends] == [3, 6]
    assert all(f"eval_loss/{name}" in record and f"loss/{name}" in record for record in ends for name in SETS)
    flags = [*NEW_ROWS, *RATES, *WSD, "--no_decay", "norms", "--load_checkpoint", checkpoint]
    resumed = run_stage(tmp_path, inputs.model, sets, plugin, *flags, precision=precision)
    assert [figures(r) for r in resumed.metrics()] == [figures(r) for r in run.metrics()[3:]]
    assert weights_of(resumed.save_dir / "modeling") == weights_of(run.save_dir / "modeling")


ALL_WEIGHTS = [*RATES, "--no_decay", "embeddings", "norms", "--max_steps", 3]
KEEP = ["--keep_optimizer", "--lr_schedule", "constant", "--max_steps", 2]


def kept_message(stage: Run) -> str:
    output = " ".join(stage.output.split())
    begin = output.index("Kept Adam's moments of ")
    return output[begin : output.index(" start at zero", begin)]


def old_rows_are_zero(state: dict[str, torch.Tensor]) -> bool:
    moments = [
        tensor.view(VOCABULARY, WIDTH)
        for key, tensor in state.items()
        if key.rsplit("/", 1)[0] in EMBEDDINGS and not key.endswith("/master")
    ]
    assert len(moments) == 4
    return not any(each[: NEW_IDS.start].any() or each[NEW_IDS.stop :].any() for each in moments)


@pytest.fixture(scope="module", params=PLUGINS)
def all_weights(request, inputs, sets, tmp_path_factory) -> Run:
    """Three steps of a stage that trains everything."""
    directory = tmp_path_factory.mktemp("all")
    return run_stage(directory, inputs.model, sets, request.param, *ALL_WEIGHTS)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_optimizer_goes_from_plugin_to_plugin(plugin, all_weights, sets, tmp_path):
    """A rate of 0 leaves masters as they were; then what the moments hold shows, one step of all later."""
    start = all_weights.save_dir / "epoch-0_step-3"
    flags = ["--load_checkpoint", start, *KEEP, "--lr", 0, "--lr_embeddings", 0, "--max_steps", 1]
    flags += ["--weight_decay", 0]
    model = start / "modeling"
    stage = run_stage(tmp_path / "stage", model, sets, plugin, *flags)
    total = sum(tensor.numel() for tensor in load_weights(model).values())
    assert f"{total:,} of {total:,} trained parameters and its step count, 3," in kept_message(stage)
    (after_one,) = stage.save_dir.glob("epoch-*")
    before, after = whole_state(start), whole_state(after_one)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if key.endswith("/master"):
            assert torch.equal(after[key], tensor), key
    assert weights_of(after_one / "modeling") == weights_of(model)
    # exp_avg' = 0.9 exp_avg + 0.1 g, with a g that is the same for all parameters of all plugins: what is
    # left of 0.9 exp_avg is 0.1 g, and exp_avg_sq' = 0.95 exp_avg_sq + 0.05 g g has to agree.
    for key, tensor in before.items():
        if key.endswith("/exp_avg"):
            gradient = (after[key] - 0.9 * tensor) / 0.1
            squares = key.replace("exp_avg", "exp_avg_sq")
            wanted = 0.95 * before[squares] + 0.05 * gradient**2
            torch.testing.assert_close(after[squares], wanted, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("plugin", PLUGINS)
def test_new_rows_alone_with_the_optimizer_of_all_weights(plugin, all_weights, sets, tmp_path):
    """Moments of rows that do not train become zero: Adam would go on moving these rows."""
    start = all_weights.save_dir / "epoch-0_step-3"
    model = start / "modeling"
    flags = ["--load_checkpoint", start, *KEEP, *NEW_ROWS, *RATES]
    stage = run_stage(tmp_path / "stage", model, sets, plugin, *flags)
    assert "trained parameters and its step count, 3," in kept_message(stage)
    assert_only_new_rows_moved(stage.save_dir / "modeling", model, torch.bfloat16, at_least=0.5)
    (last,) = stage.save_dir.glob("epoch-*")
    state = whole_state(last)
    assert {key.rsplit("/", 1)[0] for key in state} == set(EMBEDDINGS)
    assert old_rows_are_zero(state)


@pytest.mark.parametrize("first", PLUGINS)
@pytest.mark.parametrize("plugin", ["zero2", "gemini"])
def test_all_weights_with_the_optimizer_of_new_rows(first, plugin, inputs, sets, tmp_path):
    """The layers had no moments; embeddings continue. The stage is resumed without --keep_optimizer."""
    rows_flags = [*NEW_ROWS, *RATES, "--max_steps", 3]
    stage_1 = run_stage(tmp_path / "rows", inputs.model, sets, first, *rows_flags)
    start = stage_1.save_dir / "epoch-0_step-3"
    flags = [*RATES, *WSD, "--save_interval", 2]
    load = ["--load_checkpoint", start, "--keep_optimizer"]
    whole = run_stage(tmp_path / "all", start / "modeling", sets, plugin, *flags, *load)
    embeddings = 2 * VOCABULARY * WIDTH
    message = kept_message(whole)
    assert message.startswith(f"Kept Adam's moments of {embeddings:,} of ")
    assert not old_rows_are_zero(whole_state(whole.save_dir / "epoch-0_step-2"))
    resumed = run_stage(
        *(tmp_path / "resumed", start / "modeling", sets, plugin, *flags),
        *("--load_checkpoint", whole.save_dir / "epoch-0_step-2"),
    )
    assert [figures(r) for r in resumed.metrics()] == [figures(r) for r in whole.metrics()[2:]]
    assert weights_of(resumed.save_dir / "modeling") == weights_of(whole.save_dir / "modeling")
