"""The plan of a run: processes, steps and tokens, and what a person reads of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plugin_cases import LLAMA2_7B, ULYSSES, make_config, parse, plugin_of
from transformers import LlamaConfig

from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.data.sets import RowSet
from colossal_llama.training.plan import (
    GIB,
    format_plan,
    global_batch_line,
    make_plan,
    planned_world_size,
)
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.llama_size import count_parameters

# The number of processes


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--plugin zero2", 1),
        ("--plugin 3d --tp 2 --pp 3 --batch_size 3", 6),
        (f"--plugin 3d --tp 2 {ULYSSES}", 4),
    ],
)
def test_processes_of_a_dry_run(flags: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert planned_world_size(parse(flags).layout) == expected
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert planned_world_size(parse(flags).layout) == 64


@pytest.mark.parametrize("text", ["²", "0", "-1", "many", ""])
def test_a_bad_number_of_processes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=f"WORLD_SIZE={text}: .*set it to"):
        planned_world_size(parse().layout)


# Steps and tokens


def plan_of(flags: str, num_rows: int, world_size: int, length: int = 64, config: LlamaConfig | None = None):
    plugin = plugin_of(f"--max_length {length} {flags}", world_size)
    config = config or make_config()
    return plugin, make_plan(plugin, config, RandomRows(num_rows, length, config.vocab_size, 0))


def test_steps_and_tokens_by_hand() -> None:
    _, plan = plan_of("--plugin ddp --batch_size 2 --accumulation_steps 3 --num_epochs 5", 100, world_size=4)
    assert (plan.dp_size, plan.rows_per_step, plan.steps_per_epoch, plan.tail_rows) == (4, 24, 4, 4)
    assert (plan.total_steps, plan.planned_steps) == (20, 20)
    assert plan.tokens_per_epoch == 96 * 64
    assert plan.tokens_per_step == 24 * 64
    assert (plan.schedule.peak, plan.schedule.total_steps) == (3e-4, 20)


def test_pipeline_and_sequence_groups_share_rows() -> None:
    _, plan = plan_of(f"--plugin 3d --tp 2 {ULYSSES} --accumulation_steps 1", 10, world_size=8)
    assert (plan.dp_size, plan.rows_per_step) == (2, 2)
    _, plan = plan_of("--plugin 3d --pp 2 --batch_size 4 --accumulation_steps 1", 10, world_size=4)
    assert (plan.dp_size, plan.rows_per_step) == (2, 8)


@pytest.mark.parametrize(
    ("flags", "num_rows", "warmup"),
    [("", 1600, 5), ("--warmup_steps 0", 1600, 0), ("--warmup_steps 7", 1600, 7), ("", 8, 0)],
)
def test_warm_up_is_2_5_percent_of_the_steps(flags: str, num_rows: int, warmup: int) -> None:
    _, plan = plan_of(f"--plugin ddp {flags}", num_rows, world_size=1)
    assert plan.schedule.warmup_steps == warmup


def test_max_steps_shortens_the_run_but_not_the_schedule() -> None:
    _, plan = plan_of("--plugin ddp --max_steps 3", 80, world_size=1)
    assert (plan.planned_steps, plan.total_steps, plan.schedule.total_steps) == (3, 10, 10)
    _, plan = plan_of("--plugin ddp --max_steps 30", 80, world_size=1)
    assert plan.planned_steps == 10


def test_fewer_rows_than_a_step_says_how_many_are_needed() -> None:
    with pytest.raises(
        UserError, match=r"--num_samples 31: 31 rows.*takes 32 .*give at least 32 rows, or lower"
    ):
        plan_of("--plugin ddp", 31, world_size=4)
    plugin = plugin_of("--plugin ddp", 4)
    output = replace(plugin.settings.output, benchmark=False)
    plugin.settings = replace(plugin.settings, output=output)
    with pytest.raises(UserError, match=r"--dataset: 31 rows"):
        make_plan(plugin, make_config(), RandomRows(31, 64, 128, 0))


@pytest.mark.parametrize(
    ("flags", "length", "warning"),
    [
        ("--plugin ddp --warmup_steps 10", 64, "--warmup_steps 10: the run has 10 steps"),
        ("--plugin gemini", 64, None),
        ("--plugin ddp", 64, None),
    ],
)
def test_doubts_are_warned_of(
    flags: str,
    length: int,
    warning: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan_of(flags, 80, world_size=1, length=length)
    warnings = capsys.readouterr().err.splitlines()
    if warning is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert warnings[0].startswith(f"warning: {warning}")


def test_first_log_line() -> None:
    plugin, plan = plan_of("--plugin ddp --batch_size 2 --accumulation_steps 3", 100, world_size=4)
    assert global_batch_line(plan, plugin) == (
        "Global batch: 24 rows (batch_size 2 x accumulation_steps 3 x 4 data-parallel processes), "
        "1,536 tokens when rows are full, about 1,536 with these"
    )


# What a person reads


def cells(text: str) -> dict[str, list[str]]:
    rows = [[part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_plan_for_7b_on_64_gpus() -> None:
    flags = "--plugin gemini --dry_run --use_flash_attn --use_grad_checkpoint --batch_size 2"
    flags += " --accumulation_steps 1"
    plugin, plan = plan_of(flags, num_rows=10_000, world_size=64, length=4096, config=LLAMA2_7B)
    shown = cells(format_plan(plan, plugin))
    assert shown["parameters"] == ["6,738,415,616"]
    assert shown["processes"] == ["64"]
    assert shown["rows of a step"] == ["128"]
    assert shown["steps of the schedule"] == ["78"]
    assert shown["rows left out of each epoch"] == ["16"]
    assert shown["learning rate"] == ["0.0003 down to 3e-05"]
    assert shown["tokens of this run, about"] == [f"{78 * 128 * 4096:,}"]
    assert shown["optimizer moments"] == [f"{8 * count_parameters(LLAMA2_7B) / 64 / GIB:.2f}"]
    assert shown["at its fullest"] == [f"{plan.memory[0].peak / GIB:,.2f}"]
    assert "gradients" not in shown
    assert "CPU memory, offloaded" not in shown


def test_plan_of_a_pipeline_shows_first_fullest_and_last_stage() -> None:
    flags = "--plugin 3d --pp 4 --batch_size 4 --zero_cpu_offload --max_steps 2"
    plugin, plan = plan_of(flags, 500, world_size=8, length=4096, config=LLAMA2_7B)
    text = format_plan(plan, plugin)
    assert "stage 1 of 4" in text
    assert "stage 4 of 4" in text
    shown = cells(text)
    assert len(shown["weights"]) == 2
    assert shown["steps of this run (--max_steps)"] == ["2"]
    assert shown["plugin and layout"] == ["3d, tp 1 x pp 4 x sp 1, ZeRO stage 1"]
    assert float(shown["CPU memory, offloaded"][0]) > 0
    assert "Korthikanti" in text


def test_plan_of_a_small_model_is_in_mebibytes() -> None:
    plugin, plan = plan_of("--plugin ddp", 80, world_size=1)
    text = format_plan(plan, plugin)
    assert "memory of a process (MiB, estimated)" in text
    assert cells(text)["at its fullest"] == [f"{plan.memory[0].peak / 1024**2:.2f}"]


def test_what_trains_differently_is_in_the_plan() -> None:
    plugin, plan = plan_of("--plugin ddp --lr_embeddings 1e-4 --no_decay norms embeddings", 100, world_size=1)
    text = format_plan(plan, plugin)
    assert "learning rate of the embeddings" in text
    assert "0.0001 down to 1e-05" in text
    assert "embeddings, norms" in text
    assert "new rows" not in text
    flags = "--plugin ddp --freeze_non_embeds_params new_rows --lr_embeddings 2e-4"
    plugin, plan = plan_of(flags, 100, world_size=1)
    plugin.new_ids = range(1000, 2345)
    text = format_plan(plan, plugin, [("evaluation", "at epoch ends")])
    assert "1,000 to 2,344 of each embedding" in text
    # The embeddings alone train: no weight has the other rate.
    assert cells(text)["learning rate"] == ["0.0002 down to 2e-05"]
    assert " 2.0e-04 |" in text
    assert "learning rate of the embeddings" not in text
    assert "at epoch ends" in text


# Several sets


class TwoSets(RandomRows):
    """The first 60 rows are one set, the others another."""

    def __init__(self) -> None:
        super().__init__(100, 64, 128, 0)
        sizes = {"new": (0, 60), "old/web": (60, 100)}
        self.sets = [
            RowSet(name, end - start, 64 * (end - start), [[(start, end)]])
            for name, (start, end) in sizes.items()
        ]


def plan_of_sets(flags: str):
    plugin = plugin_of(f"--max_length 64 --plugin ddp --batch_size 4 --accumulation_steps 2 {flags}", 1)
    return make_plan(plugin, make_config(), TwoSets()), plugin


def test_a_mixture_is_planned_with_its_tokens_passes_and_shares() -> None:
    plan, plugin = plan_of_sets("--dataset_weights 3 1 --num_epochs 3")
    assert [plan.order.epoch_rows(epoch) for epoch in range(3)] == [80, 80, 80]
    assert (plan.rows, plan.steps_per_epoch, plan.total_steps, plan.tail_rows) == (80, 10, 30, 0)
    assert plan.tokens_per_epoch == 80 * 64
    assert [(each.run_tokens, each.passes, each.share, each.wanted) for each in plan.sets] == [
        (180 * 64, 3.0, 0.75, 0.75),
        (60 * 64, 1.5, 0.25, 0.25),
    ]
    lines = [line.split() for line in format_plan(plan, plugin).splitlines()]
    assert ["old/web", "40", "2,560", "3,840", "1.50", "25.00%", "25.00%"] in lines
    assert ["rows", "of", "an", "epoch", "80"] in lines
    half, plugin = plan_of_sets("--dataset_weights 3 1 --num_epochs 3 --max_steps 15")
    assert "old/web    40   2,560                      1,920    0.75  25.00%  25.00%" in format_plan(
        half, plugin
    )


def test_sets_that_are_not_mixed_are_shown_too() -> None:
    plan, plugin = plan_of_sets("")
    assert [(each.share, each.passes, each.wanted) for each in plan.sets] == [
        (0.6, 1.0, None),
        (0.4, 1.0, None),
    ]
    assert "wanted" not in format_plan(plan, plugin)


def test_too_many_repeats_end_a_plan() -> None:
    with pytest.raises(UserError, match="set old/web would be passed over 6 times in the run"):
        plan_of_sets("--dataset_weights 1 4")
    plan, _ = plan_of_sets("--dataset_weights 1 4 --max_repeats 6")
    assert plan.sets[1].passes == 6
