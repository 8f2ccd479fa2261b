"""What a resumed run may change, and the schedule that it gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import make_config

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun, model_facts, state_json
from colossal_llama.training.checkpoint.resume import check_resumable, resume_schedule
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.layout import Layout
from colossal_llama.training.plan import RunPlan, make_plan
from colossal_llama.training.plugins import find_plugin
from colossal_llama.training.schedule import LearningRateSchedule
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


@pytest.mark.parametrize(
    ("fact", "value", "hint"),
    [("rope_theta", 5e5, " (--rope_theta sets it)"), ("rms_norm_eps", 1e-5, "")],
)
def test_another_model_is_named_with_the_flag_that_makes_it(fact, value, hint, tmp_path):
    settings = parse("--pretrained", "some/model", "--benchmark", "--plugin", "ddp")
    layout = Layout()
    record = replace(record_of(settings), layout=layout.as_json(), model=model_facts(make_config()))
    saved = saved_run(tmp_path, record)
    check_resumable(saved, record, settings, layout)
    other = replace(record, model=model_facts(make_config(**{fact: value})))
    with pytest.raises(UserError) as caught:
        check_resumable(saved, other, settings, layout)
    old = getattr(make_config(), fact)
    assert f"--pretrained: {fact} {old} when saved, {value} now{hint}" in caught.value.problems[0]
    # A version that did not record it.
    older = {name: known for name, known in record.model.items() if name != fact}
    check_resumable(replace(saved, record=replace(record, model=older)), other, settings, layout)


# The schedule


class Schedules:
    """Runs over 400 rows of a tiny model, saved after some steps and continued with other flags."""

    def __init__(self, directory: Path, *flags: object) -> None:
        self.directory = directory
        self.common = ["--pretrained", "some/model", "--benchmark", "--plugin", "ddp", *flags]

    def plan(self, *flags: object) -> tuple[RunSettings, RunPlan]:
        settings = parse(*self.common, "--accumulation_steps", 1, *flags)
        return settings, make_plan(find_plugin("ddp")(settings, 1), make_config(), RandomRows(400, 8, 100, 0))

    def save(self, steps: int, *flags: object) -> SavedRun:
        settings, plan = self.plan(*flags)
        return self.save_as(steps, TrainState(), settings.as_json(), plan, plan.schedule)

    def save_as(self, steps, state, arguments, plan, schedule) -> SavedRun:
        for _ in range(steps):
            state.advance(plan.rows_per_step, 1, plan.rows)
        record = RunRecord(arguments, {}, {}, plan.rows_per_step, plan.total_steps, {}, {})
        write_json(self.directory / "running_states.json", state_json(record, state))
        write_json(self.directory / "lr_scheduler", {**schedule.to_json(), "step": state.step})
        return SavedRun.read(self.directory)

    def resume(self, saved: SavedRun, *flags: object) -> tuple[LearningRateSchedule, dict]:
        return resume_schedule(saved, *self.plan(*flags))


@pytest.fixture
def runs(tmp_path: Path) -> Schedules:
    return Schedules(tmp_path)


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 40), (2, 20), (4, 10)])
def test_warm_up_follows_the_rows_of_a_step(batch_size, expected, runs):
    """20 steps of two rows were asked for and begun."""
    saved = runs.save(50, "--batch_size", 2, "--warmup_steps", 20)
    for flags_now in (["--warmup_steps", 20], []):
        schedule, kept = runs.resume(saved, "--batch_size", batch_size, *flags_now)
        assert (schedule.warmup_steps, schedule.total_steps) == (expected, 400 // batch_size)
        assert kept == ({} if flags_now else {"warmup_steps": 20})


@pytest.mark.parametrize("kind", ["constant", "wsd"])
def test_a_run_without_a_decay_so_far_is_prolonged(kind, runs, capsys):
    saved = runs.save(300, "--lr_schedule", kind)
    _, before = runs.plan("--lr_schedule", kind)
    schedule, _ = runs.resume(saved, "--lr_schedule", kind, "--num_epochs", 3)
    assert schedule.total_steps == 1200
    assert [schedule.at(step) for step in range(300)] == [before.schedule.at(step) for step in range(300)]
    assert schedule.warmup_steps == before.schedule.warmup_steps == 10  # 2.5 % of the 400 steps of before
    assert schedule.decay_start == (1080 if kind == "wsd" else None)
    assert "--num_epochs 1 -> 3" in capsys.readouterr().out


def test_a_decay_that_has_begun_can_not_be_put_off(runs):
    saved = runs.save(370, "--lr_schedule", "wsd")  # from step 360 on
    with pytest.raises(UserError, match=r"--num_epochs 1 -> 2: .* first that of step 362 of the schedule"):
        runs.resume(saved, "--lr_schedule", "wsd", "--num_epochs", 2)
    saved = runs.save(361, "--lr_schedule", "wsd")  # the rate of its first step is still the peak
    assert runs.resume(saved, "--lr_schedule", "wsd", "--num_epochs", 2)[0].decay_start == 720


def test_a_decay_branches_from_a_constant_rate(runs):
    wsd = ["--lr_schedule", "wsd"]
    for kind in ("constant", "wsd"):
        saved = runs.save(100, "--lr_schedule", kind)
        decay = [*wsd, "--decay_start", 100, "--decay_steps", 20, "--min_lr_ratio", 0]
        branch, _ = runs.resume(saved, *decay)
        assert (branch.decay_start, branch.total_steps) == (100, 120)
        assert branch == runs.plan(*decay)[1].schedule
        with pytest.raises(UserError, match="first that of step 100 of the schedule"):
            runs.resume(saved, *wsd, "--decay_start", 98, "--decay_steps", 20)


def test_a_branch_continues_without_its_flags(runs, capsys):
    wsd = ["--lr_schedule", "wsd"]
    settings, plan = runs.plan(*wsd, "--decay_start", 100, "--decay_steps", 20)
    saved = runs.save_as(110, TrainState(), settings.as_json(), plan, plan.schedule)
    for _ in range(2):
        schedule, kept = runs.resume(saved, *wsd)
        assert schedule == plan.schedule
        assert kept == {"warmup_steps": None, "decay_start": 100, "decay_steps": 20}
        arguments = {**runs.plan(*wsd)[0].as_json(), **kept}  # as the resumed run records them
        saved = runs.save_as(0, saved.state, arguments, plan, schedule)
    assert capsys.readouterr() == ("", "")
    assert runs.resume(saved, *wsd, "--num_epochs", 2)[0] == plan.schedule
    assert "--num_epochs 2: changes nothing" in capsys.readouterr().err


def test_steps_of_a_branch_follow_the_rows_of_a_step(runs):
    flags = ["--lr_schedule", "wsd", "--decay_start", 100, "--decay_steps", 20]
    saved = runs.save(104, "--batch_size", 2, *flags)
    for flags_now in (flags, flags[:2]):
        schedule, _ = runs.resume(saved, "--batch_size", 4, *flags_now)
        assert (schedule.decay_start, schedule.total_steps) == (50, 60)
        schedule, _ = runs.resume(saved, "--batch_size", 1, *flags_now)
        assert (schedule.decay_start, schedule.total_steps) == (200, 240)
    # What is given anew counts steps of now.
    saved = runs.save(50, "--batch_size", 2, *flags[:2])
    schedule, _ = runs.resume(saved, "--batch_size", 4, *flags)
    assert (schedule.decay_start, schedule.total_steps) == (100, 120)


def test_rounding_does_not_make_a_decay_end_after_the_data(runs):
    saved = runs.save(10, "--batch_size", 1, "--lr_schedule", "wsd", "--decay_start", 395, "--decay_steps", 5)
    schedule, _ = runs.resume(saved, "--batch_size", 3, "--lr_schedule", "wsd")
    assert (schedule.decay_start, schedule.total_steps) == (131, 133)  # 400 // 3


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        ("", "--num_epochs 2", 12),  # the step after the first one at the peak
        ("", "--lr_schedule linear", 12),
        ("", "--min_lr_ratio 0", 12),
        ("", "--warmup_steps 11", 1),
        ("--lr_schedule constant", "--lr_schedule linear", 12),
        ("--lr_schedule wsd --decay_steps 350", "--lr_schedule wsd --decay_steps 340", 52),
        ("--lr_schedule wsd --decay_start 40", "--lr_schedule wsd --decay_start 41", 42),
    ],
)
def test_a_change_of_the_past_is_refused(before, now, step, runs):
    flags = ["--warmup_steps", 10, *before.split()]
    saved = runs.save(60, *flags)
    with pytest.raises(UserError, match=rf"first that of step {step} of the schedule \([\d.e-]+ then"):
        runs.resume(saved, *now.split())
    assert runs.resume(saved, *flags)[0] == runs.plan(*flags)[1].schedule


def test_what_is_the_same_so_far_may_change_in_the_warm_up(runs):
    saved = runs.save(5)
    assert runs.resume(saved, "--lr_schedule", "linear", "--num_epochs", 4)[0].total_steps == 1600


def test_fewer_epochs_than_are_done(runs):
    saved = runs.save(450, "--num_epochs", 3, "--lr_schedule", "constant")
    with pytest.raises(UserError, match=r"--num_epochs 1: .* is in epoch 2 of the run"):
        runs.resume(saved, "--lr_schedule", "constant")
    assert runs.resume(saved, "--lr_schedule", "constant", "--num_epochs", 2)[0].total_steps == 800


def test_a_schedule_of_an_earlier_version(runs):
    """It had three numbers, and the arguments had no name for its shape."""
    saved = runs.save(60)
    arguments = {name: value for name, value in saved.record.arguments.items() if "decay" not in name}
    for name in ("lr_schedule", "min_lr_ratio", "keep_optimizer"):
        arguments.pop(name, None)
    saved = replace(saved, record=replace(saved.record, arguments=arguments))
    assert saved.schedule.keys() == {"peak", "warmup_steps", "total_steps", "step"}
    assert runs.resume(saved)[0] == runs.plan()[1].schedule


@given(data=st.data())
def test_what_a_resumed_run_did_is_what_its_flags_say(data, tmp_path_factory):
    """Whatever is accepted: the rates of the steps done are those of the run that was saved."""
    runs = Schedules(tmp_path_factory.mktemp("run"))

    def draw_flags() -> list[object]:
        kind = data.draw(st.sampled_from(["cosine", "linear", "constant", "wsd"]))
        flags = ["--lr_schedule", kind, "--num_epochs", data.draw(st.integers(1, 3)), "--batch_size", 40]
        flags += ["--warmup_steps", data.draw(st.integers(0, 3))] if data.draw(st.booleans()) else []
        if kind == "wsd":
            flags += ["--decay_steps", data.draw(st.integers(1, 4))] if data.draw(st.booleans()) else []
            flags += ["--decay_start", data.draw(st.integers(3, 6))] if data.draw(st.booleans()) else []
        return flags

    before, now = draw_flags(), draw_flags()
    _, plan = runs.plan(*before)
    saved = runs.save(data.draw(st.integers(1, plan.total_steps)), *before)
    try:
        schedule, _ = runs.resume(saved, *now)
    except UserError:
        return
    done = range(saved.state.step)
    assert [schedule.at(step) for step in done] == [plan.schedule.at(step) for step in done]
    assert runs.resume(saved, *before) == (plan.schedule, runs.resume(saved, *before)[1])


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

    config = make_config()
    facts = [model_facts(config, new_ids) for new_ids in (range(5, 9), range(6, 9))]
    saved = saved_run(tmp_path, replace(both, model=facts[0]))
    with pytest.raises(UserError, match=r"--pretrained: new_rows \[5, 9\] when saved, \[6, 9\] now"):
        check_resumable(saved, replace(turned, model=facts[1]), settings, layout)
