"""What a run continues from, and what may have changed since: the rules of `--load_checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.training.checkpoint.directories import (
    checkpoint_step,
    find_damage,
    list_checkpoints,
    resolve_checkpoint,
)
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun
from colossal_llama.training.layout import Layout
from colossal_llama.training.schedule import LearningRateSchedule, ScheduleSettings, make_schedule
from colossal_llama.training.settings import OutputSettings, RunSettings
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError, is_main_process
from colossal_llama.utils.settings import OnResume

if TYPE_CHECKING:
    from colossal_llama.training.plan import RunPlan


def find_checkpoint(output: OutputSettings) -> tuple[Path | None, Path | None]:
    """`resolve_checkpoint` for all ranks: rank 0 decides, every rank reads a share of the files for it."""
    import torch.distributed as dist

    def find_damage_together(checkpoint: Path) -> str | None:
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, find_damage(checkpoint, dist.get_rank(), dist.get_world_size()))
        return next((damage for damage in found if damage is not None), None)

    def from_main(message: Any) -> Any:
        shared = [message]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    answer: Any = None
    if is_main_process():
        try:
            answer = resolve_checkpoint(
                output.load_checkpoint,
                output.save_dir,
                lambda checkpoint: find_damage_together(from_main(checkpoint)),
            )
        except UserError as error:
            answer = error
        from_main(answer)
    else:
        while isinstance(answer := from_main(None), Path):
            find_damage_together(answer)
    if isinstance(answer, UserError):
        raise answer
    return answer


def refuse_used_save_dir(output: OutputSettings) -> None:
    """A run that starts from the beginning must not mix its checkpoints with another run's."""
    found = [] if output.benchmark else list_checkpoints(output.save_dir)
    if found and output.load_checkpoint != "latest":
        raise UserError(
            f"--save_dir {output.save_dir}: holds {len(found)} checkpoints of an earlier run; continue it "
            "with --load_checkpoint latest, or give another directory"
        )


def check_resumable(saved: SavedRun, record: RunRecord, settings: RunSettings, layout: Layout) -> None:
    """Compares a checkpoint's run with this one. A flag that the checkpoint does not know counts as its
    default.

    Raises:
        UserError: data or arguments that shape the training differ; each change is named.
    """
    problems, flags = [], settings.flags()
    for key, value in record.data.items():
        if saved.record.data.get(key) != value:
            problems.append(f"--dataset: {key} {saved.record.data.get(key)} when saved, {value} now")
    for key, value in record.model.items():
        if (old := saved.record.model.get(key, value)) != value:
            flag = f" (--{key} sets it)" if key in flags else ""
            problems.append(f"--pretrained: {key} {old} when saved, {value} now{flag}")
    allowed = {OnResume.FREE, OnResume.SCHEDULE}  # `resume_schedule` looks at the latter
    if layout.changes_since(saved.record.layout):
        allowed.add(OnResume.WITH_LAYOUT)
    for name, value in record.arguments.items():
        if flags[name].on_resume in allowed:
            continue
        old = flags[name].meaning(saved.record.arguments.get(name, flags[name].default))
        now = flags[name].meaning(value)
        if old != now:
            problems.append(f"--{name}: {old} when saved, {now} now")
    if problems:
        where = f"--load_checkpoint {saved.checkpoint}: "
        problems = [where + problem for problem in problems]
        problems.append(
            "resume with what the run was started with, or start a new stage from "
            f"{saved.checkpoint / 'modeling'}"
        )
        raise UserError(problems)


def warn_of_later_checkpoints(output: OutputSettings, state: TrainState) -> None:
    """A run that was taken back to an earlier step may take another course than the checkpoints after it."""
    later = [path.name for path in list_checkpoints(output.save_dir) if checkpoint_step(path) > state.step]
    if later and output.load_checkpoint != "latest":  # that has passed over damaged ones
        warn(
            f"--save_dir {output.save_dir}: holds later checkpoints ({', '.join(later)}), and `latest` means "
            "them until this run has passed them; move them away if it is to take another course"
        )


def continue_at_same_row(saved: SavedRun, state: TrainState, plan: RunPlan, num_epochs: int) -> None:
    """Adapts the position when a step now has another number of rows than when it was saved."""
    before = saved.record.rows_per_step
    if before == plan.rows_per_step:
        return
    _continue_at_row(state, plan, num_epochs)
    log(
        f"A step has {plan.rows_per_step} rows instead of {before}: "
        f"{plan.total_steps - state.schedule_offset} steps in all; warm-up and learning rate follow the rows"
    )


def _continue_at_row(state: TrainState, plan: RunPlan, num_epochs: int) -> None:
    state.change_rows_per_step(
        plan.rows_per_step, plan.order.epoch_rows, num_epochs, plan.steps_in(num_epochs)
    )


def resume_schedule(
    saved: SavedRun, settings: RunSettings, plan: RunPlan
) -> tuple[LearningRateSchedule, dict[str, Any]]:
    """The schedule of a run that continues: what the checkpoint had, where the flags have not changed.

    Steps count rows once a run has begun: where a step has another number of them now, what the checkpoint
    says is converted, and the steps that were done count for as much of the schedule as their rows do.

    Returns:
        The schedule, and the values of flags that were not given now and come from the checkpoint.

    Raises:
        UserError: with these flags, a step that was done would have had another learning rate.
    """
    declared = {name: each for name, each in settings.flags().items() if each.on_resume is OnResume.SCHEDULE}
    values = settings.as_json()
    now = {name: values[name] for name in declared}
    old = {name: saved.record.arguments.get(name, each.default) for name, each in declared.items()}
    state = replace(saved.state)
    if (epochs := state.epoch + (state.position > 0)) > now["num_epochs"]:
        raise UserError(
            f"--num_epochs {now['num_epochs']}: {saved.checkpoint} is in epoch {epochs} of the run; give at "
            f"least {epochs}"
        )
    taken = {"warmup_steps"} if now["warmup_steps"] is None else set()
    if now["decay_start"] is None and old["decay_start"] is not None and now["lr_schedule"] == "wsd":
        taken |= {"decay_start", "decay_steps"} if now["decay_steps"] is None else {"decay_start"}
    kept = {name: old[name] for name in taken}
    now.update(kept)
    schedule = _continued(saved, old, now, plan)
    was = LearningRateSchedule.from_json(saved.schedule)
    if saved.record.rows_per_step != plan.rows_per_step:
        was = _continued(saved, old, old, plan)
        _continue_at_row(state, plan, old["num_epochs"])
    if schedule == was:
        if now["num_epochs"] != old["num_epochs"]:
            warn(
                f"--num_epochs {now['num_epochs']}: changes nothing, since the run ends with its decay, at "
                f"step {schedule.total_steps:,} of the schedule"
            )
        return schedule, kept
    changed = ", ".join(
        f"--{name} {_shown(old[name])} -> {_shown(now[name])}" for name in declared if old[name] != now[name]
    )
    for step in range(state.step + state.schedule_offset):
        if (then := was.at(step)) != (would := schedule.at(step)):
            raise UserError(
                f"--load_checkpoint {saved.checkpoint}: {changed}: the learning rate of steps that are done "
                f"would change, first that of step {step + 1} of the schedule ({then:.6g} then, {would:.6g} "
                "with these flags); give the flags that the run was started with, resume from a checkpoint "
                "before that step, or start a new stage with --keep_optimizer"
            )
    log(f"The schedule changes from here on ({changed}): {schedule}, {schedule.total_steps:,} steps in all")
    return schedule, kept


def _continued(
    saved: SavedRun, old: Mapping[str, Any], now: Mapping[str, Any], plan: RunPlan
) -> LearningRateSchedule:
    """The schedule of flags `now` in a run that was saved with `old`.

    Steps that are given as they were come from the checkpoint, which has them in steps of its own.
    """
    before = LearningRateSchedule.from_json(saved.schedule)
    data_steps = plan.steps_in(now["num_epochs"])
    wanted = ScheduleSettings(**{each.name: now[each.name] for each in fields(ScheduleSettings)})
    ratio = saved.record.rows_per_step / plan.rows_per_step
    warmup_steps = now["warmup_steps"]
    if warmup_steps == old["warmup_steps"]:
        warmup_steps = round(before.warmup_steps * ratio)
    if before.decay_start is not None:
        if wanted.decay_steps is not None and wanted.decay_steps == old["decay_steps"]:
            decay_steps = max(1, round((before.total_steps - before.decay_start) * ratio))
            wanted = replace(wanted, decay_steps=decay_steps)
        if wanted.decay_start is not None and wanted.decay_start == old["decay_start"]:
            start = round(before.decay_start * ratio)
            if ratio != 1:  # other rows are left out of the epochs, and rounding may put the end too late
                start = min(start, data_steps - (wanted.decay_steps or 0))
            wanted = replace(wanted, decay_start=start)
    return make_schedule(wanted, plan.schedule.peak, warmup_steps, data_steps)


def _shown(value: Any) -> Any:
    return "default" if value is None else value


def check_adapter_base(now: dict[str, Any], saved: SavedRun | None, pretrained: str) -> None:
    """The weights under a resumed run's adapters must be those that the adapters were trained on.

    Args:
        now: dtype and sum of the weights under the adapters.
    """
    before = (saved.record.adapter_base if saved is not None else None) or {}
    if before.get("dtype") != now["dtype"]:
        return  # rounded to another type, the same weights have another sum
    if not math.isclose(before["sum"], now["sum"], rel_tol=1e-6, abs_tol=1e-6):
        raise UserError(
            f"--pretrained {pretrained}: holds other weights than those that the adapters in "
            f"{saved.checkpoint if saved else ''} were trained on; give the same model"
        )
