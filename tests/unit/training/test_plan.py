"""The plan of a run: contradictions, steps and tokens, and the estimate of memory."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.dataset.dummy_dataset import RandomRows
from colossal_llama.training import attention
from colossal_llama.training.arguments import build_parser
from colossal_llama.training.attention import install_attention
from colossal_llama.training.plan import (
    GIB,
    MemoryEstimate,
    activation_bytes_per_token,
    check_layout,
    count_held_parameters,
    count_parameters,
    dry_run_world_size,
    estimate_memory,
    format_plan,
    global_batch_line,
    layers_of_stages,
    make_plan,
    matrix_parameters,
    padded_length,
)
from colossal_llama.utils.errors import UserError

SEQUENCE_PARALLEL = "--tp 2 --enable_sequence_parallelism --sp_mode split_gather"
ULYSSES = "--sp 2 --enable_sequence_parallelism --sp_mode all_to_all"


def parse(flags: str = "") -> argparse.Namespace:
    return build_parser().parse_args(["--pretrained", "some/model", "--benchmark", *flags.split()])


def make_config(**changes: object) -> LlamaConfig:
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8192,
    }
    return LlamaConfig(**{**shape, **changes})


LLAMA2_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=4096,
)
CONFIGS = [
    {},
    {"tie_word_embeddings": True},
    {"num_key_value_heads": 8},
    {"num_key_value_heads": 1},
    {"head_dim": 16},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "vocab_size": 101},
]


# Parameters


@pytest.mark.parametrize("changes", CONFIGS)
def test_parameters_are_those_of_the_real_model(changes: dict) -> None:
    config = make_config(**changes)
    model = LlamaForCausalLM(config)
    assert count_parameters(config) == model.num_parameters()
    held = count_held_parameters(parse("--plugin ddp"), config, 0)
    assert held.total == held.trainable == model.num_parameters()
    assert held.linear == sum(
        p.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()
    )
    assert matrix_parameters(config) == model.num_parameters() - (
        0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    )


def test_llama_2_7b_has_its_known_size() -> None:
    assert count_parameters(LLAMA2_7B) == 6_738_415_616


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_parameters(tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied)
    frozen = count_held_parameters(parse("--plugin ddp --freeze_non_embeds_params"), config, 0)
    assert frozen.total == count_parameters(config)
    assert frozen.trainable == (1 if tied else 2) * 128 * 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["freeze", "train"])
def test_lora_parameters_are_those_of_peft(embeddings: str, tied: bool) -> None:
    from colossal_llama.training.model import add_lora

    config = make_config(tie_word_embeddings=tied)
    model = add_lora(LlamaForCausalLM(config), 4, None, 0, embeddings == "train")
    trainable, total = model.get_nb_trainable_parameters()
    args = parse(f"--plugin ddp --lora_rank 4 --lora_embeddings {embeddings}")
    counts = count_held_parameters(args, config, 0)
    assert (counts.trainable, counts.total) == (trainable, total)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_ranks_hold_everything_once_but_for_the_norms(tp: int, tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied, vocab_size=1024)
    held = count_held_parameters(parse(f"--plugin 3d --tp {tp}"), config, 0).total
    norms = (2 * 4 + 1) * 64
    assert held * tp == count_parameters(config) + norms * (tp - 1)


def test_vocabulary_is_padded_to_64_times_tp() -> None:
    config = make_config(vocab_size=101)
    padded = make_config(vocab_size=256)
    args = parse("--plugin 3d --tp 4")
    assert count_held_parameters(args, config, 0) == count_held_parameters(args, padded, 0)


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 12))
def test_stages_get_all_layers_as_colossalai_deals_them(num_layers: int, pp: int) -> None:
    from colossalai.pipeline.stage_manager import PipelineStageManager

    theirs = PipelineStageManager.__new__(PipelineStageManager)
    theirs.num_layers_per_stage, theirs.num_model_chunks = None, 1
    assert layers_of_stages(num_layers, pp) == theirs.distribute_layers(num_layers, num_stages=pp)


def test_stages_together_hold_the_model() -> None:
    config = make_config(num_hidden_layers=6)
    args = parse("--plugin 3d --pp 4 --batch_size 4")
    stages = [count_held_parameters(args, config, stage).total for stage in range(4)]
    assert sum(stages) == count_parameters(config)
    # Two layers in each middle stage; embedding at the start, norm and head at the end.
    layer = (count_parameters(config) - 64 - 2 * 128 * 64) // 6
    assert stages == [layer + 128 * 64, 2 * layer, 2 * layer, layer + 64 + 128 * 64]


# Contradictions


def problems(flags: str, world_size: int, **changes: object) -> list[str]:
    return check_layout(parse(flags), make_config(**changes), world_size)


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
    (
        "--plugin 3d --pp 4 --batch_size 4 --freeze_non_embeds_params",
        4,
        {},
        "--freeze_non_embeds_params the middle stages have nothing to train",
        "use --pp 2",
    ),
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
        ("--plugin 3d --pp 2 --batch_size 2 --freeze_non_embeds_params", 2),
    ],
)
def test_good_layouts_pass(flags: str, world_size: int) -> None:
    assert problems(flags, world_size) == []


def test_gemini_needs_a_gpu_but_can_be_planned_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = problems("--plugin gemini_auto", 2)
    assert problem.startswith("--plugin gemini_auto: runs on GPUs only")
    assert "use zero2, ddp or 3d on a CPU" in problem
    assert problems("--plugin gemini_auto --dry_run", 2) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert problems("--plugin gemini_auto", 2) == []


def test_flash_attention_needs_its_package_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_flash_attn", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problems("--plugin ddp --use_flash_attn", 1) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (problem,) = problems("--plugin ddp --use_flash_attn", 1)
    assert problem.startswith("--use_flash_attn: ")
    assert "install it" in problem
    monkeypatch.setattr(attention, "has_flash_attn", lambda: True)
    assert problems("--plugin ddp --use_flash_attn", 1) == []


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
    assert dry_run_world_size(parse(flags)) == expected
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert dry_run_world_size(parse(flags)) == 64


@pytest.mark.parametrize("text", ["²", "0", "-1", "many", ""])
def test_a_bad_number_of_processes(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UserError, match=f"WORLD_SIZE={text}: .*set it to"):
        dry_run_world_size(parse())


# Steps and tokens


def plan_of(flags: str, num_rows: int, world_size: int, length: int = 64, config: LlamaConfig | None = None):
    args = parse(f"--max_length {length} {flags}")
    config = config or make_config()
    return args, make_plan(args, config, RandomRows(num_rows, length, config.vocab_size, 0), world_size)


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
    assert plan.warmup_steps == plan.schedule.warmup_steps == warmup


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
    args = parse("--plugin ddp")
    args.benchmark = False
    with pytest.raises(UserError, match=r"--dataset: 31 rows"):
        make_plan(args, make_config(), RandomRows(31, 64, 128, 0), 4)


@pytest.mark.parametrize(
    ("flags", "length", "warning"),
    [
        ("--plugin ddp --warmup_steps 10", 64, "--warmup_steps 10: the run has 10 steps"),
        ("--plugin ddp", 9000, "--max_length 9000: the model was made for 8192 positions"),
        ("--plugin gemini --dry_run", 64, "--plugin gemini: runs on GPUs only"),
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
    args, plan = plan_of("--plugin ddp --batch_size 2 --accumulation_steps 3", 100, world_size=4)
    assert global_batch_line(plan, args) == (
        "Global batch: 24 rows (batch_size 2 x accumulation_steps 3 x 4 data-parallel processes), "
        "1,536 tokens when rows are full, about 1,536 with these"
    )


# Memory


def memory(
    flags: str, world_size: int = 8, stage: int = 0, config: LlamaConfig = LLAMA2_7B
) -> MemoryEstimate:
    return estimate_memory(parse(flags), config, world_size, stage)


N = 6_738_415_616


def states(estimate: MemoryEstimate) -> tuple[int, int, int, int]:
    return estimate.weights, estimate.gradients, estimate.master_weights, estimate.moments


def test_states_of_each_plugin_by_hand() -> None:
    """Bytes a parameter on 8 processes, half precision: weights, gradients, fp32 masters, two moments."""
    assert states(memory("--plugin zero2")) == (2 * N, 2 * N // 8, 4 * N // 8, 8 * N // 8)
    assert states(memory("--plugin gemini --accumulation_steps 1")) == (2 * N // 8, 0, 4 * N // 8, N)
    assert states(memory("--plugin gemini")) == (2 * N // 8, 2 * N // 8, 4 * N // 8, N)
    assert states(memory("--plugin 3d --zero_stage 0")) == (2 * N, 2 * N, 4 * N, 8 * N)
    assert states(memory("--plugin 3d --zero_stage 1")) == (2 * N, 2 * N, 4 * N // 8, N)
    assert states(memory("--plugin 3d --zero_stage 2")) == (2 * N, 2 * N // 8, 4 * N // 8, N)
    assert states(memory("--plugin ddp --mixed_precision fp32")) == (4 * N, 4 * N, 0, 8 * N)
    # Beside its fp32 weights, ddp keeps half-precision copies of what linear layers use.
    linear = N - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert states(memory("--plugin ddp")) == (4 * N + 2 * linear, 4 * N, 0, 8 * N)


def test_offloaded_state_is_in_cpu_memory() -> None:
    on_gpu, offloaded = memory("--plugin zero2"), memory("--plugin zero2_cpu")
    assert (offloaded.master_weights, offloaded.moments, offloaded.step_copies) == (0, 0, 0)
    assert offloaded.host == on_gpu.master_weights + on_gpu.moments + on_gpu.step_copies
    assert asdict(memory("--plugin 3d --zero_stage 2 --zero_cpu_offload")) == asdict(offloaded)


def test_sequence_parallel_ranks_share_optimizer_state() -> None:
    estimate = memory(f"--plugin 3d --zero_stage 1 {ULYSSES}", world_size=8)
    assert estimate.moments == 8 * N // 8


def test_frozen_parameters_have_no_optimizer_state() -> None:
    estimate = memory("--plugin zero2 --freeze_non_embeds_params", world_size=1)
    trainable = 2 * 32000 * 4096
    assert states(estimate) == (2 * N, 2 * trainable, 4 * trainable, 8 * trainable)


def test_fp32_gradients_exist_when_activations_are_gone() -> None:
    estimate = MemoryEstimate(weights=1, gradients=2, activations=10, loss=5, communication=1, step_copies=12)
    assert estimate.peak == 3 + 16
    assert MemoryEstimate(weights=1, activations=10, step_copies=12).peak == 13


def saved_bytes(config: LlamaConfig, use_flash: bool, dtype: torch.dtype, autocast: bool) -> int:
    """What torch keeps for the backward pass of a second layer: two layers' storages less one layer's."""
    sizes = []
    for num_layers in (1, 2):
        config.num_hidden_layers = num_layers
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype).model
        install_attention(model, use_flash=False)
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}
        kept = []

        def pack(tensor: torch.Tensor, parameters=parameters, storages=storages, kept=kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
                kept.append(tensor)
            return tensor

        tokens = torch.randint(0, config.vocab_size, (2, 32))
        # One document in each row: no mask, as with flash attention; several: a mask.
        documents = torch.zeros(2, 32, dtype=torch.long)
        if not use_flash:
            documents[:, 10:] = 1
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False),
        ):
            model(input_ids=tokens, attention_mask=documents, use_cache=False)
        sizes.append(sum(storages.values()))
    return sizes[1] - sizes[0]


@pytest.mark.parametrize("use_flash", [False, True])
@pytest.mark.parametrize("kv_heads", [8, 4])
@pytest.mark.parametrize(
    ("flags", "dtype", "autocast"),
    [
        ("--plugin zero2 --mixed_precision bf16", torch.bfloat16, False),
        ("--plugin zero2 --mixed_precision fp32", torch.float32, False),
        ("--plugin ddp --mixed_precision bf16", torch.float32, True),
    ],
)
def test_activations_of_a_layer_are_what_torch_keeps(
    flags: str, dtype: torch.dtype, autocast: bool, kv_heads: int, use_flash: bool
) -> None:
    config = make_config(hidden_size=128, intermediate_size=320, num_key_value_heads=kv_heads)
    args = parse(f"{flags} --max_length 32" + (" --use_flash_attn" if use_flash else ""))
    estimated = 2 * 32 * activation_bytes_per_token(args, config)
    measured = saved_bytes(config, use_flash, dtype, autocast)
    value = 4 if dtype == torch.float32 and not autocast else 2
    if autocast:
        # The half-precision copies of the weights are counted with the weights.
        measured -= value * (2 * 128 * 128 + 2 * 128 * 16 * kv_heads + 3 * 128 * 320)
    if use_flash and value == 2:
        # flash-attn takes keys and values as they are; here they are repeated for grouped queries.
        measured -= 2 * 32 * value * 2 * 16 * (8 - kv_heads)
    assert estimated == pytest.approx(measured, rel=0.02)


def activations(flags: str, **options: int) -> int:
    return memory(flags, **options).activations


def test_activations_of_a_checkpointed_model_by_hand() -> None:
    per_token = activation_bytes_per_token(parse("--use_flash_attn"), LLAMA2_7B)
    # Two norms of 8 bytes, queries, keys, values and output of 2 bytes, four tensors of the MLP of 2 bytes.
    assert per_token == 16 * 4096 + 8 * 4096 + 8 * 11008
    whole = activations("--plugin zero2 --use_flash_attn")
    assert whole == 32 * per_token * 4096
    checkpointed = activations("--plugin zero2 --use_flash_attn --use_grad_checkpoint")
    assert checkpointed == (32 * 2 * 4096 + per_token) * 4096


def test_logits_are_held_in_chunks() -> None:
    few = make_config(hidden_size=8, vocab_size=1000)
    # A head of no account beside the logits of 100 tokens: fp32, and two half-precision values.
    estimate = memory("--plugin zero2 --max_length 100", config=few)
    assert estimate.loss == 100 * 1000 * (4 + 2 + 2) + 4 * 8000 + 2 * 100 * 8
    # With a large vocabulary the chunk stays at 64 Mi values, however long the row is.
    large = make_config(hidden_size=8, vocab_size=128_256)
    growth = [memory(f"--plugin zero2 --max_length {n}", config=large).loss for n in (4096, 8192)]
    assert growth[1] - growth[0] == 4096 * 8 * 2
    # Gemini computes whole logits.
    assert memory("--plugin gemini --max_length 4096", config=large).loss == 4096 * 128_256 * (4 + 4 + 2)


def test_first_stage_holds_most_microbatches() -> None:
    flags = "--plugin 3d --pp 4 --batch_size 8 --microbatch_size 2 --use_flash_attn"
    held = [activations(flags, stage=stage) for stage in range(4)]
    assert held == [held[3] * in_flight for in_flight in (4, 3, 2, 1)]
    losses = [memory(flags, stage=stage).loss for stage in range(4)]
    assert losses[:3] == [0, 0, 0]
    assert losses[3] > 0


LESS_MEMORY = [
    ("--plugin zero2", "--plugin zero2 --use_grad_checkpoint"),
    ("--plugin zero2", "--plugin zero2 --use_flash_attn"),
    ("--plugin zero2 --batch_size 2", "--plugin zero2"),
    ("--plugin zero2", "--plugin zero2 --max_length 2048"),
    ("--plugin zero2", "--plugin zero2_cpu"),
    ("--plugin ddp", "--plugin zero2"),
    ("--plugin zero2", "--plugin gemini"),
    ("--plugin 3d --zero_stage 0", "--plugin 3d --zero_stage 1"),
    ("--plugin 3d --zero_stage 1", "--plugin 3d --zero_stage 2"),
    ("--plugin 3d --zero_stage 0", "--plugin 3d --zero_stage 0 --tp 2"),
    ("--plugin 3d --zero_stage 0 --tp 2", "--plugin 3d --zero_stage 0 --tp 4"),
    ("--plugin 3d --zero_stage 0 --tp 2", f"--plugin 3d --zero_stage 0 {SEQUENCE_PARALLEL}"),
    ("--plugin 3d --zero_stage 0", f"--plugin 3d --zero_stage 0 {ULYSSES}"),
    ("--plugin 3d --zero_stage 0", "--plugin 3d --zero_stage 0 --pp 2 --batch_size 2"),
    ("--plugin zero2", "--plugin zero2 --freeze_non_embeds_params"),
    ("--plugin zero2 --mixed_precision fp32", "--plugin zero2"),
]


@pytest.mark.parametrize(("more", "less"), LESS_MEMORY)
def test_what_saves_memory_lowers_the_estimate(more: str, less: str) -> None:
    assert memory(less).peak < memory(more).peak


@pytest.mark.parametrize("plugin", ["zero2", "gemini", "3d"])
def test_more_processes_never_need_more_memory(plugin: str) -> None:
    peaks = [memory(f"--plugin {plugin}", world_size=2**k).peak for k in range(8)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_rows_are_padded_to_a_multiple_of_the_sequence_parts() -> None:
    assert padded_length(parse("--max_length 101")) == 101
    assert padded_length(parse(f"--plugin 3d --max_length 101 {SEQUENCE_PARALLEL}")) == 102
    assert padded_length(parse(f"--plugin 3d --max_length 101 --tp 2 {ULYSSES}")) == 102


# What a person reads


def cells(text: str) -> dict[str, list[str]]:
    rows = [[part.strip() for part in line.split("  ") if part.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_plan_for_7b_on_64_gpus() -> None:
    flags = "--plugin gemini --dry_run --use_flash_attn --use_grad_checkpoint --batch_size 2"
    flags += " --accumulation_steps 1"
    args, plan = plan_of(flags, num_rows=10_000, world_size=64, length=4096, config=LLAMA2_7B)
    shown = cells(format_plan(plan, args))
    assert shown["parameters"] == ["6,738,415,616"]
    assert shown["processes"] == ["64"]
    assert shown["rows of a step"] == ["128"]
    assert shown["steps of the schedule"] == ["78"]
    assert shown["rows left out of each epoch"] == ["16"]
    assert shown["learning rate"] == ["0.0003 down to 3e-05"]
    assert shown["tokens of this run, about"] == [f"{78 * 128 * 4096:,}"]
    assert shown["optimizer moments"] == [f"{8 * N / 64 / GIB:.2f}"]
    assert shown["at its fullest"] == [f"{plan.memory[0].peak / GIB:,.2f}"]
    assert "gradients" not in shown
    assert "CPU memory, offloaded" not in shown


def test_plan_of_a_pipeline_shows_first_fullest_and_last_stage() -> None:
    flags = "--plugin 3d --pp 4 --batch_size 4 --zero_cpu_offload --max_steps 2"
    args, plan = plan_of(flags, 500, world_size=8, length=4096, config=LLAMA2_7B)
    text = format_plan(plan, args)
    assert "stage 1 of 4" in text
    assert "stage 4 of 4" in text
    shown = cells(text)
    assert len(shown["weights"]) == 2
    assert shown["steps of this run (--max_steps)"] == ["2"]
    assert shown["plugin and layout"] == ["3d, tp 1 x pp 4 x sp 1, ZeRO stage 1"]
    assert float(shown["CPU memory, offloaded"][0]) > 0
    assert "Korthikanti" in text


def test_plan_of_a_small_model_is_in_mebibytes() -> None:
    args, plan = plan_of("--plugin ddp", 80, world_size=1)
    text = format_plan(plan, args)
    assert "memory of a process (MiB, estimated)" in text
    assert cells(text)["at its fullest"] == [f"{plan.memory[0].peak / 1024**2:.2f}"]
