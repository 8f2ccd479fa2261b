"""What a run continues from, and what may have changed since: the rules of `--load_checkpoint`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from colossal_llama.training.checkpoint.directories import (
    checkpoint_step,
    find_damage,
    list_checkpoints,
    resolve_checkpoint,
)
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun
from colossal_llama.training.layout import Layout
from colossal_llama.training.schedule import LearningRateSchedule
from colossal_llama.training.settings import OutputSettings, RunSettings
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError, is_main_process
from colossal_llama.utils.settings import OnResume


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
    problems = []
    for key, value in record.data.items():
        if saved.record.data.get(key) != value:
            problems.append(f"--dataset: {key} {saved.record.data.get(key)} when saved, {value} now")
    for key, value in record.model.items():
        if (old := saved.record.model.get(key, value)) != value:
            problems.append(f"--pretrained: {key} {old} when saved, {value} now")
    allowed = {OnResume.FREE}
    if layout.changes_since(saved.record.layout):
        allowed.add(OnResume.WITH_LAYOUT)
    flags = settings.flags()
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


def continue_at_same_row(
    saved: SavedRun,
    state: TrainState,
    rows_per_step: int,
    total_steps: int,
    rows_per_epoch: Callable[[int], int],
    num_epochs: int,
) -> None:
    """Adapts the position when a step now has another number of rows than when it was saved."""
    before = saved.record.rows_per_step
    if before == rows_per_step:
        return
    state.change_rows_per_step(rows_per_step, rows_per_epoch, num_epochs, total_steps)
    log(
        f"A step has {rows_per_step} rows instead of {before}: "
        f"{total_steps - state.schedule_offset} steps in all; warm-up and learning rate follow the rows"
    )


def rescale_warmup(
    schedule: LearningRateSchedule, warmup_steps: int | None, saved: SavedRun, rows_per_step: int
) -> LearningRateSchedule:
    """Warm-up steps that were given count rows once the run has begun: steps of another size scale them.

    Args:
        warmup_steps: as given; None for a share of all steps, which needs no scaling.
    """
    if warmup_steps is None:
        return schedule
    rows = saved.schedule["warmup_steps"] * saved.record.rows_per_step
    return replace(schedule, warmup_steps=round(rows / rows_per_step))


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
