"""The estimate of memory: parameters are those of real models, states and activations those of a run."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from plugin_cases import LLAMA2_7B, SEQUENCE_PARALLEL, ULYSSES, make_config, plugin_of
from transformers import LlamaConfig, LlamaForCausalLM

from colossal_llama.training.llama.attention import install_attention
from colossal_llama.training.memory import (
    MemoryEstimate,
    activation_bytes_per_token,
    estimate_memory,
    memory_in_name,
    why_too_large,
)
from colossal_llama.utils.llama_size import count_parameters, matrix_parameters

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
    held = plugin_of("--plugin ddp").count_held_parameters(config)
    assert held.total == held.trainable == model.num_parameters()
    assert held.linear == sum(
        p.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) for p in m.parameters()
    )
    assert matrix_parameters(config) == model.num_parameters() - (
        0 if config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    )


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("freeze", [False, True])
def test_tensors_that_train_are_those_of_the_real_model(changes: dict, freeze: bool) -> None:
    from colossal_llama.training.llama.adapters import freeze_all_but_embeddings

    config = make_config(**changes)
    model = LlamaForCausalLM(config)
    if freeze:
        freeze_all_but_embeddings(model)
    expected = tuple(p.numel() for p in model.parameters() if p.requires_grad)
    flags = f"--plugin gemini --freeze_non_embeds_params {freeze}"
    assert plugin_of(flags).count_held_parameters(config).tensors == expected


def test_llama_2_7b_has_its_known_size() -> None:
    assert count_parameters(LLAMA2_7B) == 6_738_415_616


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", ["", " new_rows"])
def test_trainable_parameters(tied: bool, rows: str) -> None:
    """Gradients and moments are those of whole matrices where only new rows change."""
    config = make_config(tie_word_embeddings=tied)
    frozen = plugin_of(f"--plugin ddp --freeze_non_embeds_params{rows}").count_held_parameters(config)
    assert frozen.total == count_parameters(config)
    assert frozen.trainable == (1 if tied else 2) * 128 * 64


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["freeze", "train"])
def test_lora_parameters_are_those_of_peft(embeddings: str, tied: bool) -> None:
    from colossal_llama.training.llama.adapters import add_lora

    config = make_config(tie_word_embeddings=tied)
    model = add_lora(LlamaForCausalLM(config), 4, None, 0, embeddings == "train")
    trainable, total = model.get_nb_trainable_parameters()
    plugin = plugin_of(f"--plugin ddp --lora_rank 4 --lora_embeddings {embeddings}")
    counts = plugin.count_held_parameters(config)
    assert (counts.trainable, counts.total) == (trainable, total)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_ranks_hold_everything_once_but_for_the_norms(tp: int, tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied, vocab_size=1024)
    held = plugin_of(f"--plugin 3d --tp {tp}").count_held_parameters(config).total
    norms = (2 * 4 + 1) * 64
    assert held * tp == count_parameters(config) + norms * (tp - 1)


def test_vocabulary_is_padded_to_64_times_tp() -> None:
    config = make_config(vocab_size=101)
    padded = make_config(vocab_size=256)
    plugin = plugin_of("--plugin 3d --tp 4")
    assert plugin.count_held_parameters(config) == plugin.count_held_parameters(padded)


def test_stages_together_hold_the_model() -> None:
    config = make_config(num_hidden_layers=6)
    plugin = plugin_of("--plugin 3d --pp 4 --batch_size 4")
    stages = [plugin.count_held_parameters(config, stage).total for stage in range(4)]
    assert sum(stages) == count_parameters(config)
    # Two layers in each middle stage; embedding at the start, norm and head at the end.
    layer = (count_parameters(config) - 64 - 2 * 128 * 64) // 6
    assert stages == [layer + 128 * 64, 2 * layer, 2 * layer, layer + 64 + 128 * 64]


# Bytes


def memory(
    flags: str, world_size: int = 8, stage: int = 0, config: LlamaConfig = LLAMA2_7B
) -> MemoryEstimate:
    return estimate_memory(plugin_of(flags, world_size), config, stage)


N = 6_738_415_616


def states(estimate: MemoryEstimate) -> tuple[int, int, int, int]:
    return estimate.weights, estimate.gradients, estimate.master_weights, estimate.moments


def test_states_of_each_plugin_by_hand() -> None:
    """Bytes a parameter on 8 processes, half precision: weights, gradients, fp32 masters, two moments."""
    assert states(memory("--plugin zero2")) == (2 * N, 2 * N // 8, 4 * N // 8, 8 * N // 8)
    assert states(memory("--plugin 3d --zero_stage 0")) == (2 * N, 2 * N, 4 * N, 8 * N)
    assert states(memory("--plugin 3d --zero_stage 1")) == (2 * N, 2 * N, 4 * N // 8, N)
    assert states(memory("--plugin 3d --zero_stage 2")) == (2 * N, 2 * N // 8, 4 * N // 8, N)
    assert states(memory("--plugin ddp --mixed_precision fp32")) == (4 * N, 4 * N, 0, 8 * N)
    # Beside its fp32 weights, ddp keeps half-precision copies of what linear layers use.
    linear = N - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert states(memory("--plugin ddp")) == (4 * N + 2 * linear, 4 * N, 0, 8 * N)


def test_gemini_spreads_everything_in_chunks_that_are_padded_a_little() -> None:
    spread = memory("--plugin gemini --accumulation_steps 1")
    padded = spread.weights // 2
    assert N // 8 <= padded <= 1.02 * N // 8
    assert states(spread) == (2 * padded, 0, 4 * padded, N)
    assert states(memory("--plugin gemini")) == (2 * padded, 2 * padded, 4 * padded, N)
    # The embedding or the head in a chunk of its own, and a chunk beside it; one more for a gradient.
    embedding = 32000 * 4096
    assert 2 * embedding <= spread.communication <= 2 * (embedding + 2 * 32 * 1024**2 + 11008 * 4096)
    assert memory("--plugin gemini").communication >= spread.communication + 2 * embedding
    frozen = memory("--plugin gemini --freeze_non_embeds_params")
    assert frozen.weights - frozen.gradients == 2 * (N - 2 * embedding)


def test_gemini_auto_needs_pinned_blocks_of_the_host() -> None:
    config = make_config(num_hidden_layers=1)
    for flags, bytes_of_a_value in (("--accumulation_steps 1", 2 + 4), ("", 2 + 4 + 2)):
        (_, host), size = states_of_host(flags, config), count_parameters(config)
        # Rounded up to powers of two, twice as much at most; and two moments of each parameter.
        assert 0 < host - 8 * size // 4 - bytes_of_a_value * size / 4 < bytes_of_a_value * size / 4 * 1.1
    large = memory("--plugin gemini_auto")
    assert states(large) == (large.weights, 0, 0, 0)
    assert large.weights < memory("--plugin gemini").weights
    assert memory("--plugin gemini_auto", world_size=16).host < 0.6 * large.host


def states_of_host(flags: str, config: LlamaConfig) -> tuple[int, int]:
    estimate = memory(f"--plugin gemini_auto {flags}", world_size=4, config=config)
    return estimate.weights, estimate.host


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
        install_attention(model)
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
    plugin = plugin_of(f"{flags} --max_length 32" + (" --use_flash_attn" if use_flash else ""))
    estimated = 2 * 32 * activation_bytes_per_token(plugin, config)
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
    per_token = activation_bytes_per_token(plugin_of("--use_flash_attn"), LLAMA2_7B)
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


def test_copies_of_a_background_save_are_in_pinned_memory() -> None:
    """Masters, moments and weights of a process, half as much again since blocks are powers of two."""
    assert memory("--plugin zero2").pinned == (12 * N // 8 + 2 * N // 8) * 3 // 2
    assert memory("--plugin zero2_cpu").pinned == memory("--plugin zero2").pinned
    assert memory("--plugin ddp --mixed_precision fp32").pinned == (12 * N + 4 * N // 8) * 3 // 2
    assert memory("--plugin zero2 --no-async_save").pinned == 0
    assert memory("--plugin zero2").peak == memory("--plugin zero2 --no-async_save").peak


# Models that do not fit


def test_a_model_that_cannot_fit_is_refused() -> None:
    """What every step holds has to fit; activations, which depend on the rows, may be estimated too high."""
    estimates = [MemoryEstimate(weights=3, moments=5, activations=100), MemoryEstimate(weights=4)]
    assert why_too_large(estimates, 8) is None
    reason = why_too_large(estimates, 7)
    assert reason is not None
    for word in ("in each process", "--tp", "zero2_cpu", "--dry_run"):
        assert word in reason


@pytest.mark.parametrize(
    ("name", "gib"), [("NVIDIA H100 80GB HBM3", 80), ("NVIDIA A100-SXM4-40GB", 40), ("NVIDIA H200", None)]
)
def test_the_size_in_the_name_of_a_device(name: str, gib: int | None) -> None:
    assert memory_in_name(name) == (None if gib is None else gib * 1024**3)
