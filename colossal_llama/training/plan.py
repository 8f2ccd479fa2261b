"""What a run will do and need, computed before it starts: steps, tokens, memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from colossal_llama.training.data.mixing import MixedOrder, find_repeat_problems, make_order
from colossal_llama.training.data.order import RowOrder
from colossal_llama.training.layout import Layout, LayoutSettings
from colossal_llama.training.memory import (
    GIB,
    MemoryEstimate,
    ParameterCounts,
    count_held_parameters,
    estimate_memory,
)
from colossal_llama.training.reporting.rate_chart import draw_rate
from colossal_llama.training.schedule import LearningRateSchedule, default_warmup, make_schedule
from colossal_llama.utils.console import format_table, warn
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.data.rows import RowDataset
    from colossal_llama.training.plugins.base import Plugin

MIB = 1024**2


def planned_world_size(layout: LayoutSettings) -> int:
    """Processes to plan for: WORLD_SIZE, as launchers set it, or the fewest that the layout allows."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return layout.model_parallel_size
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"WORLD_SIZE={text}: is not a number of processes; set it to 1 or more, or unset it")
    return int(text)


@dataclass(frozen=True)
class SetPlan:
    """What a run takes from a set of its data.

    Attributes:
        rows, tokens: that the set has.
        wanted: share of the tokens that `--dataset_weights` asks for; None without.
        share: of the tokens of all epochs.
        run_tokens: of the set, in all epochs.
    """

    name: str
    rows: int
    tokens: int
    wanted: float | None
    share: float
    run_tokens: int

    @property
    def passes(self) -> float:
        return self.run_tokens / max(1, self.tokens)


@dataclass
class RunPlan:
    """What a run will do.

    Attributes:
        dp_size: processes that see different rows.
        order: of the rows in each epoch.
        sets: where the data has several.
        rows: of an epoch (the first one, where sets are mixed); `tail_rows` of them, too few for a step,
            are left out of each epoch.
        rows_per_step: over all processes and accumulated passes.
        data_steps: optimizer steps that the data has in all epochs. The schedule may end earlier.
        max_steps: steps after which --max_steps ends the run; negative for none.
        tokens_per_epoch: padding not counted, rows left out not counted (at the data's mean row length).
        parameters: of the whole model; `trainable` have gradients.
        memory: one estimate for each pipeline stage.
    """

    world_size: int
    dp_size: int
    order: RowOrder | MixedOrder
    sets: list[SetPlan]
    rows: int
    rows_per_step: int
    steps_per_epoch: int
    data_steps: int
    max_steps: int
    tail_rows: int
    tokens_per_epoch: int
    schedule: LearningRateSchedule
    parameters: ParameterCounts
    memory: list[MemoryEstimate]

    def steps_in(self, num_epochs: int) -> int:
        """Optimizer steps that the data has in so many epochs."""
        return sum(self.order.epoch_rows(epoch) // self.rows_per_step for epoch in range(num_epochs))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole schedule."""
        return self.schedule.total_steps

    @property
    def planned_steps(self) -> int:
        """Those of them that run under --max_steps."""
        return self.total_steps if self.max_steps < 0 else min(self.max_steps, self.total_steps)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens_per_epoch / self.steps_per_epoch


def make_plan(plugin: Plugin, config: LlamaConfig, source: RowDataset) -> RunPlan:
    """Computes the plan; doubtful settings that are no errors are warned of.

    Raises:
        UserError: there are fewer rows than one optimizer step takes.
    """
    settings, layout = plugin.settings, plugin.layout
    optimizer = settings.optimizer
    order, sets = _plan_order(plugin, source)
    rows, rows_per_step = order.epoch_rows(0), layout.rows_per_step
    epoch_steps = [order.epoch_rows(epoch) // rows_per_step for epoch in range(optimizer.num_epochs)]
    steps_per_epoch = epoch_steps[0]
    if min(epoch_steps) == 0:
        flag = f"--num_samples {rows}" if settings.output.benchmark else "--dataset"
        raise UserError(
            f"{flag}: {rows:,} rows, but one optimizer step takes {rows_per_step:,} "
            f"(--batch_size {layout.batch_size} x --accumulation_steps {layout.accumulation_steps} x "
            f"{layout.dp_size} data-parallel processes); give at least {rows_per_step:,} rows, or lower "
            "--accumulation_steps"
        )
    data_steps = sum(epoch_steps)
    warmup_steps = default_warmup(data_steps) if optimizer.warmup_steps is None else optimizer.warmup_steps
    schedule = make_schedule(settings.schedule, optimizer.lr, warmup_steps, data_steps)
    for message in _doubts(plugin, config, warmup_steps, schedule.total_steps):
        warn(message)
    used_rows = steps_per_epoch * rows_per_step
    return RunPlan(
        world_size=layout.world_size,
        dp_size=layout.dp_size,
        order=order,
        sets=sets,
        rows=rows,
        rows_per_step=rows_per_step,
        steps_per_epoch=steps_per_epoch,
        data_steps=data_steps,
        max_steps=optimizer.max_steps,
        tail_rows=rows - used_rows,
        tokens_per_epoch=round(_tokens_of_epoch(order, source) * used_rows / rows),
        schedule=schedule,
        parameters=count_held_parameters(config, settings.adaptation, Layout()),
        memory=[estimate_memory(plugin, config, stage) for stage in range(layout.pp)],
    )


def _plan_order(plugin: Plugin, source: RowDataset) -> tuple[RowOrder | MixedOrder, list[SetPlan]]:
    """The order of the rows, and what it takes from each of several sets."""
    wanted, optimizer = plugin.settings.data, plugin.settings.optimizer
    weights = wanted.dataset_weights if source.sets else None
    if weights is not None:
        problems = find_repeat_problems(source.sets, weights, optimizer.num_epochs, wanted.max_repeats)
        if problems:
            raise UserError(problems)
    order = make_order(source, optimizer.seed, wanted)
    if len(source.sets) < 2:
        return order, []
    run_tokens = order.set_tokens(optimizer.num_epochs)
    shares = [None] * len(source.sets) if weights is None else [weight / sum(weights) for weight in weights]
    return order, [
        SetPlan(each.name, each.num_rows, each.num_tokens, share, tokens / max(1, sum(run_tokens)), tokens)
        for each, share, tokens in zip(source.sets, shares, run_tokens, strict=True)
    ]


def _tokens_of_epoch(order: RowOrder | MixedOrder, source: RowDataset) -> int:
    return sum(order.set_tokens(1)) if isinstance(order, MixedOrder) else source.num_tokens


def _doubts(plugin: Plugin, config: LlamaConfig, warmup_steps: int, total_steps: int) -> list[str]:
    doubts = []
    if warmup_steps >= total_steps:
        doubts.append(
            f"--warmup_steps {warmup_steps}: the run has {total_steps} steps, so the learning rate only rises"
        )
    return [*doubts, *plugin.gpu_doubts(config), *plugin.doubts()]


def global_batch_line(plan: RunPlan, plugin: Plugin) -> str:
    """The first log line of a run."""
    layout = plugin.layout
    return (
        f"Global batch: {plan.rows_per_step:,} rows (batch_size {layout.batch_size} x accumulation_steps "
        f"{layout.accumulation_steps} x {plan.dp_size} data-parallel processes), "
        f"{plan.rows_per_step * plugin.settings.data.max_length:,} tokens when rows are full, about "
        f"{plan.tokens_per_step:,.0f} with these"
    )


def format_plan(plan: RunPlan, plugin: Plugin, more: Sequence[tuple[str, object]] = ()) -> str:
    """The plan as tables: the run, its sets, its learning rate, and the memory of a process by part.

    Args:
        more: rows for the end of the first table.
    """
    tables = [
        _format_run(plan, plugin, more),
        _format_sets(plan),
        draw_rate(_shown_schedule(plan, plugin)),
        _format_memory(plan, plugin),
    ]
    return "\n\n".join(table for table in tables if table)


def _format_run(plan: RunPlan, plugin: Plugin, more: Sequence[tuple[str, object]]) -> str:
    optimizer = plugin.settings.optimizer
    schedule = _shown_schedule(plan, plugin)
    rows: list[tuple[str, object]] = [
        ("parameters", plan.parameters.total),
        ("of them trained", plan.parameters.trainable),
        *_adaptation_rows(plan, plugin),
        ("processes", plan.world_size),
        ("plugin and layout", plugin.describe_layout()),
        ("precision", plugin.layout.mixed_precision),
        ("data-parallel processes", plan.dp_size),
        ("rows of an epoch" if isinstance(plan.order, MixedOrder) else "rows of the data", plan.rows),
        ("rows of a step", plan.rows_per_step),
        ("tokens of a step, about", round(plan.tokens_per_step)),
        ("steps of an epoch", plan.steps_per_epoch),
        ("rows left out of each epoch", plan.tail_rows),
        ("epochs", optimizer.num_epochs),
        ("steps of the schedule", plan.total_steps),
        ("warm-up steps", schedule.warmup_steps),
        ("learning rate", str(schedule)),
        ("shape of its decay", "none" if schedule.shape == "constant" else schedule.shape),
    ]
    if (peak := plugin.settings.adaptation.lr_embeddings) is not None and schedule is plan.schedule:
        rows.append(("learning rate of the embeddings", str(replace(plan.schedule, peak=peak))))
    if plan.planned_steps != plan.total_steps:
        rows.append(("steps of this run (--max_steps)", plan.planned_steps))
    rows.append(("tokens of this run, about", round(plan.tokens_per_step * plan.planned_steps)))
    return format_table(("plan", ""), [*rows, *more])


def _shown_schedule(plan: RunPlan, plugin: Plugin) -> LearningRateSchedule:
    """The rates of most parameters: where the embeddings alone train, theirs."""
    adaptation = plugin.settings.adaptation
    if adaptation.lr_embeddings is None or not adaptation.freeze_non_embeds_params:
        return plan.schedule
    return replace(plan.schedule, peak=adaptation.lr_embeddings)


def _format_sets(plan: RunPlan) -> str:
    """What the run takes from each of several sets."""
    if not plan.sets:
        return ""
    done = plan.planned_steps / plan.total_steps
    header = ["set", "rows", "tokens", "tokens of this run, about", "passes", "share"]
    is_mixed = any(each.wanted is not None for each in plan.sets)
    rows = []
    for each in plan.sets:
        figures = [f"{each.rows:,}", f"{each.tokens:,}", f"{each.run_tokens * done:,.0f}"]
        rows.append([each.name, *figures, f"{each.passes * done:.2f}", f"{each.share:.2%}"])
        if each.wanted is not None:
            rows[-1].append(f"{each.wanted:.2%}")
    return format_table([*header, *(["wanted"] if is_mixed else [])], rows)


def _adaptation_rows(plan: RunPlan, plugin: Plugin) -> list[tuple[str, object]]:
    """What trains differently from the rest of the parameters that the memory is counted for."""
    rows: list[tuple[str, object]] = []
    if plugin.new_ids is not None:
        ids = plugin.new_ids
        rows.append(("of these change: new rows", f"{ids.start:,} to {ids.stop - 1:,} of each embedding"))
    if plugin.settings.adaptation.no_decay:
        rows.append(("without weight decay", ", ".join(sorted(set(plugin.settings.adaptation.no_decay)))))
    return rows


def _format_memory(plan: RunPlan, plugin: Plugin) -> str:
    peaks = [estimate.peak for estimate in plan.memory]
    shown = sorted({0, peaks.index(max(peaks)), len(peaks) - 1})
    unit, unit_name = (GIB, "GiB") if max(peaks) >= GIB else (MIB, "MiB")
    header = [f"memory of a process ({unit_name}, estimated)"]
    header += [f"stage {stage + 1} of {len(peaks)}" if len(peaks) > 1 else "" for stage in shown]
    rows = []
    for part in fields(MemoryEstimate):
        values = [getattr(plan.memory[stage], part.name) / unit for stage in shown]
        if any(values) and part.name not in ("host", "pinned"):
            rows.append([part.metadata["label"], *(f"{value:,.2f}" for value in values)])
    rows.append(["at its fullest", *(f"{peaks[stage] / unit:,.2f}" for stage in shown)])
    for part in fields(MemoryEstimate):
        values = [getattr(plan.memory[stage], part.name) / unit for stage in shown]
        if any(values) and part.name in ("host", "pinned"):
            rows.append([part.metadata["label"], *(f"{value:,.2f}" for value in values)])
    notes = [
        "Counted tensor by tensor (after Korthikanti et al. 2022); CUDA itself (about half a GiB), its",
        "workspaces, NCCL's buffers and fragmentation come on top: leave a tenth of the device free.",
    ]
    if any(estimate.step_copies for estimate in plan.memory):
        notes.append(
            "fp32 gradients while stepping exist when activations, loss and communication buffers are gone."
        )
    return "\n".join([format_table(header, rows), *notes, *plugin.memory_notes()])
