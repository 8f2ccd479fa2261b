"""Sets mixed by `--dataset_weights`: their figures, in every layout, and after a resume.

Only new rows train, the rate falls at the end, and each set is evaluated by itself: what a first stage of an
adaptation asks for at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_parity import EMBEDDINGS, NEW_IDS, SETS, extended, load_weights, two_sets
from launch import Run, train
from test_resume import weights_of
from training_inputs import MAX_LENGTH, TrainingInputs

from colossal_llama.training.data.mixing import MixedOrder
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories
from colossal_llama.training.data.rows import Row

WEIGHTS = (3, 1)
STEPS = 6
RUN = [
    *("--freeze_non_embeds_params", "new_rows", "--lr", 1e-3, "--warmup_steps", 2, "--max_steps", STEPS),
    *("--lr_schedule", "wsd", "--decay_start", 2, "--decay_steps", 4, "--min_lr_ratio", 0),
    *("--save_interval", 3, "--eval_interval", 3),
]
RATES = [1e-3 * share for share in (1 / 2, 1, 1, 1 / 2, 1 - 2**-0.5, 1 - 0.75**0.5)]
FP32 = ["--mixed_precision", "fp32"]
DDP = ["--plugin", "ddp", *FP32, "--batch_size", 4, "--accumulation_steps", 2]
# 16 rows a step, as two processes have with DDP.
LAYOUTS = {
    "one process": (1, ["--plugin", "ddp", *FP32, "--batch_size", 8, "--accumulation_steps", 2]),
    "zero2": (2, ["--plugin", "zero2", *FP32, "--batch_size", 2, "--accumulation_steps", 4]),
    "tp 2": (2, ["--plugin", "3d", "--tp", 2, *FP32, "--batch_size", 8, "--accumulation_steps", 2]),
    "pp 2": (
        2,
        [
            *("--plugin", "3d", "--pp", 2, "--microbatch_size", 4, *FP32),
            *("--batch_size", 8, "--accumulation_steps", 2),
        ],
    ),
    "sp 2": (
        2,
        [
            *("--plugin", "3d", "--sp", 2, "--enable_sequence_parallelism", "--sp_mode", "all_to_all", *FP32),
            *("--batch_size", 8, "--accumulation_steps", 2),
        ],
    ),
}


@pytest.fixture(scope="module")
def inputs(training_inputs, tmp_path_factory) -> TrainingInputs:
    return extended(training_inputs, tmp_path_factory.mktemp("extended") / "model")


@pytest.fixture(scope="module")
def sets(training_inputs, tmp_path_factory) -> list[Path]:
    return two_sets(training_inputs, tmp_path_factory.mktemp("sets"))


def flags(inputs: TrainingInputs, sets: list[Path]) -> list:
    return [
        *("--pretrained", inputs.model, "--max_length", MAX_LENGTH),
        *("--dataset", *sets, "--dataset_weights", *WEIGHTS, "--eval_dataset", *sets),
    ]


def loss_of_row(model, row: Row) -> tuple[float, int]:
    """Summed loss and tokens with loss, each document by itself."""
    total, count, start = 0.0, 0, 0
    for length in row.document_lengths.tolist():
        ids = torch.tensor(np.array(row.input_ids[start : start + length], dtype=np.int64))[None]
        labels = torch.tensor(np.array(row.labels[start : start + length], dtype=np.int64))[1:]
        start += length
        if length > 1:
            logits = model(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    return total, count


def assert_figures_add_up(run: Run) -> None:
    before = dict.fromkeys(SETS, 0)
    for record in run.metrics():
        assert sum(record[f"tokens/{name}"] for name in SETS) == record["tokens"]
        labels = [record.get(f"loss_tokens/{name}", 0) for name in SETS]
        sums = [record.get(f"loss/{name}", 0.0) * n for name, n in zip(SETS, labels, strict=True)]
        assert sum(sums) / sum(labels) == pytest.approx(record["loss"], rel=1e-6)
        for name, weight in zip(SETS, WEIGHTS, strict=True):
            tokens = record[f"tokens/{name}"]
            assert tokens >= before[name]
            before[name] = tokens
            assert record[f"share/{name}"] == tokens / record["tokens"]
            # Within a row at every step.
            assert abs(tokens - weight / sum(WEIGHTS) * record["tokens"]) <= MAX_LENGTH


@pytest.fixture(scope="module")
def whole(inputs, sets, tmp_path_factory) -> Run:
    run = train(tmp_path_factory.mktemp("whole"), 2, *flags(inputs, sets), *RUN, *DDP)
    assert run.returncode == 0, run.output[-3000:]
    return run


def test_figures_of_sets_are_those_of_their_rows_alone(whole, inputs, sets):
    from transformers import AutoModelForCausalLM

    assert_figures_add_up(whole)
    assert "share of new/text" in whole.output
    assert [record["lr"] for record in whole.metrics()] == pytest.approx(RATES)
    for name in SETS:  # beside the figures of an evaluation, which have the same names
        evaluated = {r["step"]: r[f"eval_loss/{name}"] for r in whole.metrics() if "eval_loss" in r}
        assert list(evaluated) == [3, 6]
        assert evaluated[6] < evaluated[3]
    data = PreparedDataset(find_part_directories(sets), MAX_LENGTH, need_documents=True)
    order = MixedOrder(data.sets, data.row_lengths(), 42, False, WEIGHTS)
    rows = next(order.steps(0, 0, 16))
    model = AutoModelForCausalLM.from_pretrained(inputs.model).eval()
    first = whole.metrics()[0]
    with torch.no_grad():
        for number, name in enumerate(SETS):
            own = [data[int(row)] for row in rows if data.sets_of(np.array([row]))[0] == number]
            sums = np.array([loss_of_row(model, row) for row in own]).sum(axis=0)
            assert first[f"loss/{name}"] == pytest.approx(sums[0] / sums[1], rel=1e-5)
            assert first[f"loss_tokens/{name}"] == sums[1]
            assert first[f"tokens/{name}"] == sum(len(row.input_ids) for row in own)
            passes = first[f"tokens/{name}"] / data.sets[number].num_tokens
            assert first[f"passes/{name}"] == pytest.approx(passes)


def figures(record: dict) -> dict:
    times = ("tokens_per_second", "step_seconds")
    return {name: value for name, value in record.items() if name not in times}


def test_a_resumed_mixture_is_exact(whole, inputs, sets, tmp_path):
    checkpoint = whole.save_dir / "epoch-0_step-3"
    state = json.loads((checkpoint / "running_states.json").read_text())
    assert state["state"]["set_tokens"] == [whole.metrics()[2][f"tokens/{name}"] for name in SETS]
    assert [each["rows"] for each in state["data"]["sets"]] == [
        json.loads((path / "part-00000" / "prepared.json").read_text())["num_rows"] for path in sets
    ]
    resume = ["--load_checkpoint", checkpoint]
    run = train(tmp_path, 2, *flags(inputs, sets), *RUN, *DDP, *resume)
    assert run.returncode == 0, run.output[-3000:]
    assert [figures(r) for r in run.metrics()] == [figures(r) for r in whole.metrics()[3:]]
    final = weights_of(whole.save_dir / "modeling")
    assert final
    assert weights_of(run.save_dir / "modeling") == final
    source, trained = load_weights(inputs.model), load_weights(run.save_dir / "modeling")
    for name, tensor in source.items():
        same = (trained[name] == tensor).reshape(len(tensor), -1).all(dim=1)
        if name in EMBEDDINGS:
            assert not same[NEW_IDS.start : NEW_IDS.stop].all()
            same[NEW_IDS.start : NEW_IDS.stop] = True
        assert same.all(), name


@pytest.mark.slow  # a run for each layout
@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_sets_are_the_same_in_every_layout(layout, whole, inputs, sets, tmp_path):
    processes, layout_flags = LAYOUTS[layout]
    run = train(tmp_path, processes, *flags(inputs, sets), *RUN, *layout_flags)
    assert run.returncode == 0, run.output[-3000:]
    assert_figures_add_up(run)
    for ours, theirs in zip(run.metrics(), whole.metrics(), strict=True):
        for name in SETS:
            assert ours[f"tokens/{name}"] == theirs[f"tokens/{name}"]
            assert ours[f"loss/{name}"] == pytest.approx(theirs[f"loss/{name}"], rel=1e-4)


@pytest.mark.slow  # a run of another layout beside the one above
def test_a_mixture_continues_at_the_same_row_with_another_number_of_rows_a_step(
    whole, inputs, sets, tmp_path
):
    layout = ["--plugin", "zero2", *FP32, "--batch_size", 6, "--accumulation_steps", 1]
    resume = ["--load_checkpoint", whole.save_dir / "epoch-0_step-3"]
    run = train(tmp_path, 2, *flags(inputs, sets), *RUN, *layout, *resume, "--max_steps", 7)
    assert run.returncode == 0, run.output[-3000:]
    # 4 steps of 12 rows end where 3 steps of 16 rows end.
    for name in SETS:
        assert run.metrics()[-1][f"tokens/{name}"] == whole.metrics()[5][f"tokens/{name}"]
