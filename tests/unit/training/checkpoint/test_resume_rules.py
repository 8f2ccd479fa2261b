"""What a resumed run may change, and the schedule that it gets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun, model_facts, state_json
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


def test_groups_and_new_rows_stay(tmp_path, tiny_model_dir):
    """A checkpoint that knows nothing of groups had one; the order of `--no_decay` means nothing."""
    settings = parse("--pretrained", tiny_model_dir, "--benchmark", "--plugin", "ddp")
    layout = Layout()
    old = replace(record_of(settings, lr_embeddings=..., no_decay=...), layout=layout.as_json())
    for same in (None, []):
        check_resumable(saved_run(tmp_path, old), record_of(settings, no_decay=same), settings, layout)
    now = record_of(settings, no_decay=["norms"], lr_embeddings=1e-5)
    with pytest.raises(UserError) as caught:
        check_resumable(saved_run(tmp_path, old), now, settings, layout)
    assert sorted(problem.partition(": ")[2] for problem in caught.value.problems[:2]) == [
        "--lr_embeddings: None when saved, 1e-05 now",
        "--no_decay: [] when saved, ['norms'] now",
    ]
    both = replace(record_of(settings, no_decay=["norms", "embeddings"]), layout=layout.as_json())
    turned = record_of(settings, no_decay=["embeddings", "norms"])
    check_resumable(saved_run(tmp_path, both), turned, settings, layout)

    config = load_config(str(tiny_model_dir), False)
    facts = [model_facts(config, new_ids) for new_ids in (range(5, 9), range(6, 9))]
    saved = saved_run(tmp_path, replace(both, model=facts[0]))
    with pytest.raises(UserError, match=r"--pretrained: new_rows \[5, 9\] when saved, \[6, 9\] now"):
        check_resumable(saved, replace(turned, model=facts[1]), settings, layout)
