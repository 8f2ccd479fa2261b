"""metrics.jsonl and TensorBoard's event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from colossal_llama.training.checkpoint.record import RunRecord, state_json
from colossal_llama.training.reporting.metrics import (
    MetricsWriter,
    describe_settings,
    read_all_stages,
    read_earlier_stages,
    read_metrics,
)
from colossal_llama.training.state import TrainState

SETTINGS = {
    "arguments": {"lr": 3e-4, "dataset": ["a|b", "c"], "eval_dataset": None, "pretrained": "基座 model"},
    "layout": {"world_size": 2},
    "total_steps": 40,
}


def make_record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": 0,
        "tokens": 1000 * step,
        "loss": 5.0 - 0.5 * step,
        "lr": 1e-4 * step,
        "grad_norm": 1.5,
        "tokens_per_second": 250.0,
        "step_seconds": 4.0,
        **more,
    }


def write(directory: Path, records: list[dict], start_step: int = 0, weights: Path | None = None) -> None:
    writer = MetricsWriter(directory, start_step, SETTINGS, weights)
    for record in records:
        writer.write(record)
    writer.close()


def load_events(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory))
    events.Reload()
    return events


def scalars(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_scalars_are_grouped_by_step_and_by_tokens(tmp_path: Path) -> None:
    evaluated = {"eval_loss": 4.25, "eval_perplexity": 70.1, "eval_loss//data/zh/arrow": 4.5}
    evaluated |= {"eval_bits_per_byte": 1.5, "eval_bits_per_byte/zh": 2.0}
    at_start = {"step": 0, "epoch": 0, "tokens": 0, "eval_bits_per_byte": 2.5}
    write(
        tmp_path, [at_start, make_record(1), make_record(2, **evaluated), make_record(3, loss_scale=1024.0)]
    )
    events = load_events(tmp_path)
    assert sorted(events.Tags()["scalars"]) == [
        "eval/bits_per_byte",
        "eval/bits_per_byte/zh",
        "eval/bits_per_byte_by_tokens",
        "eval/loss",
        "eval/loss/data/zh/arrow",
        "eval/loss_by_tokens",
        "eval/perplexity",
        "throughput/step_seconds",
        "throughput/tokens_per_second",
        "train/grad_norm",
        "train/learning_rate",
        "train/learning_rate_by_tokens",
        "train/loss",
        "train/loss_by_tokens",
        "train/loss_scale",
    ]
    assert scalars(events, "train/loss") == [(1, 4.5), (2, 4.0), (3, 3.5)]
    assert scalars(events, "train/loss_by_tokens") == [(1000, 4.5), (2000, 4.0), (3000, 3.5)]
    assert scalars(events, "train/learning_rate_by_tokens") == [(1000, 1e-4), (2000, 2e-4), (3000, 3e-4)]
    assert scalars(events, "eval/loss") == [(2, 4.25)]
    assert scalars(events, "eval/loss_by_tokens") == [(2000, 4.25)]
    assert scalars(events, "eval/bits_per_byte") == [(0, 2.5), (2, 1.5)]
    assert scalars(events, "eval/bits_per_byte/zh") == [(2, 2.0)]
    assert scalars(events, "eval/bits_per_byte_by_tokens") == [(0, 2.5), (2000, 1.5)]
    assert scalars(events, "throughput/tokens_per_second") == [(1, 250.0), (2, 250.0), (3, 250.0)]


def test_the_runs_settings_are_text_in_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, [make_record(1)])
    events = load_events(tmp_path)
    (tag,) = events.Tags()["tensors"]
    assert tag == "arguments/text_summary"
    (event,) = events.Tensors(tag)
    text = event.tensor_proto.string_val[0].decode()
    assert text == describe_settings(SETTINGS)
    assert text.splitlines() == [
        "### arguments",
        "",
        "| name | value |",
        "| --- | --- |",
        "| lr | `0.0003` |",
        "| dataset | `a\\|b, c` |",
        "| eval_dataset | `None` |",
        "| pretrained | `基座 model` |",
        "",
        "### layout",
        "",
        "| name | value |",
        "| --- | --- |",
        "| world_size | `2` |",
        "",
        "### run",
        "",
        "| name | value |",
        "| --- | --- |",
        "| total_steps | `40` |",
    ]


def test_a_resumed_run_is_cut_back_to_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, [make_record(step) for step in (1, 2, 3, 4)])
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    write(tmp_path, [make_record(3, loss=9.0)], start_step=2)
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path)] == [
        (1, 4.5),
        (2, 4.0),
        (3, 9.0),
    ]
    events = load_events(tmp_path)
    assert scalars(events, "train/loss") == [(1, 4.5), (2, 4.0), (3, 9.0)]
    assert scalars(events, "train/loss_by_tokens") == [(1000, 4.5), (2000, 4.0), (3000, 9.0)]
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_a_new_run_moves_the_old_ones_metrics_aside(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        write(tmp_path, [make_record(1, loss=loss)])
    found = [read_metrics(tmp_path / name)[0]["loss"] for name in ("previous-1", "previous-2", ".")]
    assert found == [1.0, 2.0, 3.0]
    assert scalars(load_events(tmp_path / "previous-2"), "train/loss") == [(1, 2.0)]


@pytest.mark.parametrize("start_step", [0, 2])
def test_what_no_run_wrote_is_moved_aside(tmp_path: Path, start_step: int) -> None:
    """Files of another program that have these names, be it a new run or one that continues elsewhere."""
    names = ("metrics.jsonl", "earlier_stages.jsonl", "training_curves.png", "events.out.tfevents.1.theirs")
    for name in names:
        (tmp_path / name).write_bytes(b'{"epoch": 3}\n5\n\xff')
    write(tmp_path, [make_record(3)], start_step=start_step)
    assert {path.name for path in (tmp_path / "previous-1").iterdir()} == set(names)
    assert all((tmp_path / "previous-1" / name).read_bytes() == b'{"epoch": 3}\n5\n\xff' for name in names)
    assert [record["step"] for record in read_metrics(tmp_path)] == [3]
    assert not (tmp_path / "earlier_stages.jsonl").exists()


def test_values_that_json_can_not_hold_are_null(tmp_path: Path) -> None:
    write(tmp_path, [make_record(1, grad_norm=math.inf)])
    line = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert record["grad_norm"] is None
    assert "train/grad_norm" not in load_events(tmp_path).Tags()["scalars"]


def leave_checkpoint(save_dir: Path, logs: Path, step: int) -> None:
    """What `read_earlier_stages` reads of a checkpoint."""
    checkpoint = save_dir / f"epoch-0_step-{step}"
    (checkpoint / "modeling").mkdir(parents=True)
    (checkpoint / "COMPLETE").write_text("{}", encoding="utf-8")
    record = RunRecord({"tensorboard_dir": str(logs)}, {}, {}, 1, step, model={}, versions={})
    state = state_json(record, TrainState(step=step, tokens=1000 * step))
    (checkpoint / "running_states.json").write_text(json.dumps(state), encoding="utf-8")


def steps_of(stages: list[list[dict]]) -> list[list[int]]:
    return [[record["step"] for record in records] for records in stages]


def test_stages_are_found_through_the_weights_they_start_from(tmp_path: Path) -> None:
    logs = [tmp_path / f"logs{number}" for number in (1, 2, 3)]
    first, second = tmp_path / "first", tmp_path / "second"
    write(logs[0], [make_record(step) for step in (1, 2, 3, 4, 5)])
    leave_checkpoint(first, logs[0], 3)
    leave_checkpoint(first, logs[0], 5)
    # From a step's weights: the metrics up to that step; from the final ones: all of them.
    assert steps_of(read_earlier_stages(first / "epoch-0_step-3" / "modeling")) == [[1, 2, 3]]
    write(logs[1], [make_record(step) for step in (1, 2)], weights=first / "modeling")
    assert steps_of(read_all_stages(logs[1])) == [[1, 2, 3, 4, 5], [1, 2]]
    leave_checkpoint(second, logs[1], 2)
    write(logs[2], [make_record(1)], weights=second / "modeling")
    assert steps_of(read_all_stages(logs[2])) == [[1, 2, 3, 4, 5], [1, 2], [1]]
    # A resumed stage keeps them.
    write(logs[2], [make_record(2)], start_step=1, weights=second / "modeling")
    assert steps_of(read_all_stages(logs[2])) == [[1, 2, 3, 4, 5], [1, 2], [1, 2]]


def test_stages_that_share_a_directory(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    write(logs, [make_record(step) for step in (1, 2, 3)])
    leave_checkpoint(tmp_path / "first", logs, 3)
    for _ in range(2):  # the second time the first stage's metrics are in previous-1
        write(logs, [make_record(1, tokens=77)], weights=tmp_path / "first" / "modeling")
        assert steps_of(read_all_stages(logs)) == [[1, 2, 3], [1]]


@pytest.mark.parametrize("saved", [None, {"epoch": 0, "step": 100}, "gone"])
def test_weights_from_elsewhere_have_no_stages(tmp_path: Path, saved: Any) -> None:
    """No checkpoint; the original suite's record of one; a run whose metrics were deleted."""
    weights = tmp_path / "save" / "modeling"
    weights.mkdir(parents=True)
    if saved == "gone":
        leave_checkpoint(tmp_path / "save", tmp_path / "deleted", 3)
    elif saved:
        (tmp_path / "save" / "running_states.json").write_text(json.dumps(saved), encoding="utf-8")
    write(tmp_path / "logs", [make_record(1)], weights=weights)
    assert steps_of(read_all_stages(tmp_path / "logs")) == [[1]]


def test_a_full_disk_costs_metrics_and_not_the_run(tmp_path, capsys):
    writer = MetricsWriter(tmp_path / "logs", 0, {})
    writer.write({"step": 1, "tokens": 10, "loss": 2.0, "lr": 0.1})
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: SIM115
    for step in (2, 3):
        writer.write({"step": step, "tokens": 10 * step, "loss": 1.0, "lr": 0.1})
    writer.close()
    assert capsys.readouterr().err.count("metrics can't be written (No space left on device)") == 1
    assert [record["step"] for record in read_metrics(tmp_path / "logs")] == [1]


def test_an_evaluation_made_up_for_completes_the_last_record(tmp_path):
    writer = MetricsWriter(tmp_path, 0, {})
    for step in (1, 2):
        writer.write({"step": step, "tokens": 10 * step, "loss": 2.0, "lr": 0.1})
    writer.complete_last({"step": 2, "eval_loss": 1.5})
    writer.write({"step": 3, "tokens": 30, "loss": 1.0, "lr": 0.1})
    writer.close()
    records = read_metrics(tmp_path)
    assert [record.get("eval_loss") for record in records] == [None, 1.5, None]
    assert [record["step"] for record in records] == [1, 2, 3]


def test_an_evaluation_made_up_for_without_its_step_is_a_record(tmp_path):
    """The metrics are in another directory now, or power failed before the step's line was on the disk."""
    for before in ([], [1]):
        directory = tmp_path / str(len(before))
        writer = MetricsWriter(directory, 0, {})
        for step in before:
            writer.write({"step": step, "tokens": 10 * step, "loss": 2.0, "lr": 0.1})
        writer.complete_last({"step": 2, "tokens": 20, "eval_loss": 1.5})
        writer.write({"step": 3, "tokens": 30, "loss": 1.0, "lr": 0.1})
        writer.close()
        found = [(record["step"], record.get("eval_loss")) for record in read_metrics(directory)]
        assert found == [*((step, None) for step in before), (2, 1.5), (3, None)]


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path) -> None:
    lines = ['{"step": 1, "loss": 2.0}', "[1]", "null", '{"loss": 1.0}', '{"step": "2"}', '{"step": 3', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_metrics(tmp_path, up_to_step=5) == [{"step": 1, "loss": 2.0}]
