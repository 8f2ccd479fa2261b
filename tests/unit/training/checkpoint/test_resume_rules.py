"""What a resumed run may change, and the schedule that it gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun, state_json
from colossal_llama.training.checkpoint.resume import check_resumable, rescale_warmup
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.layout import Layout
from colossal_llama.training.llama.loading import load_config
from colossal_llama.training.plan import make_plan
from colossal_llama.training.plugins import find_plugin
from colossal_llama.training.settings import RunSettings
from colossal_llama.training.state import TrainState
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import write_json


def parse(*flags: object) -> RunSettings:
    return parse_settings(list(map(str, flags)))


def saved_run(directory: Path, record: RunRecord) -> SavedRun:
    """A checkpoint's record, as it is read back."""
    write_json(directory / "running_states.json", state_json(record, TrainState()))
    return SavedRun.read(directory)


def record_of(settings: RunSettings, **arguments: object) -> RunRecord:
    known = {**settings.as_json(), **arguments}
    arguments = {name: value for name, value in known.items() if value is not ...}
    return RunRecord(arguments, {}, {}, rows_per_step=2, total_steps=10, model={}, versions={})


@pytest.mark.parametrize("saved", [None, "freeze", ...])
def test_embeddings_that_nothing_was_said_about_were_frozen(saved, tmp_path, tiny_model_dir):
    """Also by a version without the flag."""
    settings = parse("--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp", "--lora_rank", 4)
    before = saved_run(tmp_path, record_of(settings, lora_embeddings=saved))
    layout = Layout()
    before = replace(before, record=replace(before.record, layout=layout.as_json()))
    for now in (None, "freeze"):
        check_resumable(before, record_of(settings, lora_embeddings=now), settings, layout)
    with pytest.raises(UserError, match="--lora_embeddings: freeze when saved, train now"):
        check_resumable(before, record_of(settings, lora_embeddings="train"), settings, layout)


def test_a_flag_that_a_checkpoint_does_not_know_counts_as_its_default(tmp_path, tiny_model_dir):
    settings = parse("--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp")
    layout = Layout()
    record = replace(record_of(settings, grad_clip=...), layout=layout.as_json())
    check_resumable(saved_run(tmp_path, record), record_of(settings), settings, layout)
    with pytest.raises(UserError, match=r"--grad_clip: 1\.0 when saved, 0\.5 now"):
        check_resumable(saved_run(tmp_path, record), record_of(settings, grad_clip=0.5), settings, layout)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 40), (2, 20), (4, 10)])
def test_warm_up_follows_the_rows_of_a_step(batch_size, expected, tmp_path, tiny_model_dir):
    """20 steps of two rows were asked for and begun."""
    flags = ["--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp", "--accumulation_steps", 1]
    (tmp_path / "lr_scheduler").write_text(json.dumps({"warmup_steps": 20}))
    saved = saved_run(tmp_path, record_of(parse(*flags)))
    config, rows = load_config(str(tiny_model_dir), False), RandomRows(400, 8, 100, 0)
    for given, warm_up in ((["--warmup_steps", 20], expected), ([], 400 // batch_size // 40)):
        settings = parse(*flags, "--batch_size", batch_size, *given)
        plan = make_plan(find_plugin("ddp")(settings, 1), config, rows)
        schedule = rescale_warmup(plan.schedule, settings.optimizer.warmup_steps, saved, plan.rows_per_step)
        assert schedule.warmup_steps == warm_up
        assert schedule.total_steps == 400 // batch_size


def test_a_mixture_may_not_change_on_resume_but_the_limit_of_its_repeats_may(tmp_path, tiny_model_dir):
    settings = parse("--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp")
    layout = Layout()

    def record(weights, sets, **more) -> RunRecord:
        made = replace(record_of(settings, dataset_weights=weights, **more), layout=layout.as_json())
        return replace(made, data={"rows": 9, **({} if sets is None else {"sets": sets})})

    sets = [{"rows": 4, "tokens": 40}, {"rows": 5, "tokens": 50}]
    before = saved_run(tmp_path, record([3.0, 1.0], sets))
    check_resumable(before, record([3.0, 1.0], sets, max_repeats=9), settings, layout)
    for now, message in (
        (record([2.0, 1.0], sets), r"--dataset_weights: \[3.0, 1.0\] when saved, \[2.0, 1.0\] now"),
        (record(None, None), r"--dataset_weights: \[3.0, 1.0\] when saved, None now"),
        (record([3.0, 1.0], sets[::-1]), "--dataset: sets .* when saved"),
    ):
        with pytest.raises(UserError, match=message):
            check_resumable(before, now, settings, layout)
    # A checkpoint of a version without the flag has no weights.
    older = saved_run(tmp_path, record(..., None, max_repeats=...))
    check_resumable(older, record(None, None), settings, layout)
    with pytest.raises(UserError, match="--dataset_weights: None when saved"):
        check_resumable(older, record([3.0, 1.0], sets), settings, layout)
