"""How a layout deals the model and the rows to processes, and the sizes that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import SEQUENCE_PARALLEL, ULYSSES, plugin_of
from plugin_cases import model_problems as problems

from colossal_llama.training.layout import SEQUENCE_PARALLEL_MODES, Layout, LayoutSettings, next_multiple

SIZES = st.integers(1, 8)
LAYOUTS = st.builds(
    Layout,
    tp=SIZES,
    pp=SIZES,
    sp=SIZES,
    sp_mode=st.sampled_from(SEQUENCE_PARALLEL_MODES),
    enable_sequence_parallelism=st.booleans(),
    batch_size=SIZES,
    accumulation_steps=SIZES,
    world_size=st.integers(1, 512),
)


@given(st.integers(1, 80), st.integers(1, 12))
def test_stages_get_all_layers_as_colossalai_deals_them(num_layers: int, pp: int) -> None:
    from colossalai.pipeline.stage_manager import PipelineStageManager

    theirs = PipelineStageManager.__new__(PipelineStageManager)
    theirs.num_layers_per_stage, theirs.num_model_chunks = None, 1
    assert Layout(pp=pp).layers_of_stages(num_layers) == theirs.distribute_layers(num_layers, num_stages=pp)


@given(st.integers(1, 200), st.integers(1, 64))
def test_stages_have_every_layer_once_and_differ_by_one_at_most(num_layers: int, pp: int) -> None:
    layers = Layout(pp=pp).layers_of_stages(num_layers)
    assert (len(layers), sum(layers)) == (pp, num_layers)
    assert max(layers) - min(layers) <= 1


@given(LAYOUTS, st.integers(2, 10_000))
def test_padded_rows_have_equal_parts(layout: Layout, max_length: int) -> None:
    length = layout.padded_length(max_length)
    assert length % layout.length_multiple == 0
    assert max_length <= length < max_length + layout.length_multiple


@given(LAYOUTS)
def test_a_record_tells_layouts_apart(layout: Layout) -> None:
    recorded = layout.as_json()
    assert layout.changes_since(recorded) == []
    assert replace(layout, batch_size=9, use_flash_attn=True).changes_since(recorded) == []
    assert replace(layout, tp=layout.tp + 1, zero_stage=2).changes_since(recorded) == [
        f"tp {layout.tp} -> {layout.tp + 1}",
        "zero_stage 1 -> 2",
    ]


def test_a_layout_is_settings_on_a_number_of_processes() -> None:
    layout = LayoutSettings(plugin="3d", tp=2, batch_size=3, accumulation_steps=5).on(8)
    assert (layout.dp_size, layout.rows_per_step, layout.world_size) == (4, 60, 8)
    assert layout == Layout(plugin="3d", tp=2, batch_size=3, accumulation_steps=5, world_size=8)


@given(st.integers(0, 10_000), st.integers(1, 100))
def test_the_next_multiple_is_the_smallest_that_is_enough(number: int, multiple: int) -> None:
    found = next_multiple(number, multiple)
    assert found % multiple == 0
    assert number <= found < number + multiple


LAYOUT_PROBLEMS = [
    ("--plugin 3d --tp 2 --pp 2 --batch_size 2", 6, {}, "--tp 2 --pp 2 --sp 1", "start 8 processes"),
    ("--plugin 3d --tp 8", 8, {"num_key_value_heads": 4}, "4 key/value heads", "divides 4"),
    (
        "--plugin 3d --tp 4",
        4,
        {"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8},
        "6 attention heads",
        "divides 6",
    ),
    (f"--plugin 3d {ULYSSES}", 2, {"num_key_value_heads": 1}, "--tp 1 --sp 2", "divides 1"),
    (f"--plugin 3d --tp 4 {ULYSSES}", 8, {}, "4 key/value heads can't be dealt evenly to 8", "--sp 2"),
    ("--plugin 3d --tp 4", 4, {"intermediate_size": 98}, "--tp 4: the model's MLP width 98", "divisor"),
    ("--plugin 3d --pp 5 --batch_size 5", 5, {}, "--pp 5: the model has only 4 layers", "use --pp 4"),
]


@pytest.mark.parametrize(("flags", "world_size", "changes", "names", "remedy"), LAYOUT_PROBLEMS)
def test_a_contradiction_names_flag_value_and_remedy(
    flags: str, world_size: int, changes: dict, names: str, remedy: str
) -> None:
    (problem,) = problems(flags, world_size, **changes)
    assert problem.startswith("--")
    assert names in problem
    assert remedy in problem


def test_contradictions_are_reported_together() -> None:
    found = problems("--plugin 3d --tp 3 --pp 7 --batch_size 7", 4)
    assert len(found) == 4
    assert [
        sum(part in problem for problem in found) for part in ("processes, but 4", "heads", "layers")
    ] == [
        1,
        2,
        1,
    ]


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--plugin ddp", 3),
        ("--plugin zero2", 5),
        ("--plugin 3d --tp 4 --pp 2 --batch_size 2", 16),
        (f"--plugin 3d --tp 2 {ULYSSES}", 4),
        (f"--plugin 3d {SEQUENCE_PARALLEL}", 2),
        ("--plugin 3d --pp 4 --batch_size 4 --freeze_non_embeds_params", 4),
    ],
)
def test_good_layouts_pass(flags: str, world_size: int) -> None:
    assert problems(flags, world_size) == []


def test_rows_are_padded_to_a_multiple_of_the_sequence_parts() -> None:
    assert plugin_of("--max_length 101").layout.padded_length(101) == 101
    assert plugin_of(f"--plugin 3d --max_length 101 {SEQUENCE_PARALLEL}").layout.padded_length(101) == 102
    assert plugin_of(f"--plugin 3d --max_length 101 --tp 2 {ULYSSES}").layout.padded_length(101) == 102
