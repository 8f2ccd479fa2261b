"""Parameters that a process holds, and the memory that training takes: estimates made before a run starts.

Memory is counted tensor by tensor, the way of Korthikanti et al. 2022 (arXiv:2205.05198, section 4.1: the
bytes of every tensor that the backward pass keeps), for LLaMA's layers instead of GPT's: RMSNorm, rotary
embedding, SwiGLU, grouped-query attention, no dropout. Bytes of parameters and optimizer follow Rajbhandari
et al. 2020 (arXiv:1910.02054) and what colossalai's optimizers hold; each plugin states its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.training.adaptation import AdaptationSettings
from colossal_llama.training.layout import Layout, next_multiple
from colossal_llama.utils.llama_size import head_size, layer_parameters, projections

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.plugins.base import Plugin

GIB = 1024**3
FP32_BYTES = 4
# Adam: a mean and a mean square, both fp32.
MOMENT_BYTES = 8
# colossalai pads a sharded vocabulary to a multiple of this times tp.
VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a whole model, or of the part of it that one process holds.

    Attributes:
        total: a tied matrix is counted once.
        trainable: those with gradients and optimizer state.
        linear: those of linear layers, the head included; what autocast copies to half precision.
        largest: of the largest tensor.
        tensors: of each tensor that trains, in the model's order, for plugins that ask for them.
    """

    total: int
    trainable: int
    linear: int
    largest: int
    tensors: tuple[int, ...] = ()


def _lora_parameters(config: LlamaConfig, rank: int) -> int:
    return config.num_hidden_layers * sum(
        rank * (inputs + outputs) for inputs, outputs, *_ in projections(config)
    )


def trained_tensors(config: LlamaConfig, adaptation: AdaptationSettings) -> tuple[int, ...]:
    """Elements of each tensor of the whole model that trains, in the order of `parameters()`."""
    width = config.hidden_size
    embedding = config.vocab_size * width
    head = () if config.tie_word_embeddings else (embedding,)
    if adaptation.freeze_non_embeds_params:
        return (embedding, *head)
    layer: list[int] = []
    for inputs, outputs, has_bias, _ in projections(config):
        layer += [inputs * outputs, outputs] if has_bias else [inputs * outputs]
    layer += [width, width]
    return (embedding, *layer * config.num_hidden_layers, width, *head)


def count_held_parameters(
    config: LlamaConfig,
    adaptation: AdaptationSettings,
    layout: Layout,
    stage: int = 0,
    pads_vocabulary: bool = False,
) -> ParameterCounts:
    """Parameters that a process of pipeline stage `stage` holds, before ZeRO shards anything.

    The first stage holds the embedding, the last one the final norm and the head.

    Args:
        pads_vocabulary: the plugin pads the head (and an embedding that is tied to it, or sharded) to a
            multiple of 64 x tp rows.
    """
    tp, pp = layout.tp, layout.pp
    per_layer, linear_per_layer = layer_parameters(config, tp)
    num_layers = layout.layers_of_stages(config.num_hidden_layers)[stage]
    is_first, is_last, tied = stage == 0, stage == pp - 1, config.tie_word_embeddings
    rows = rows_padded = config.vocab_size
    if pads_vocabulary:
        rows_padded = next_multiple(rows, VOCABULARY_MULTIPLE * tp) // tp
        if tp > 1 or tied:
            rows = rows_padded
    embedding = rows * config.hidden_size if is_first else 0
    head = rows_padded * config.hidden_size if is_last else 0
    vocabulary = embedding if is_first and is_last and tied else embedding + head
    decoder = num_layers * per_layer + (config.hidden_size if is_last else 0)
    lora = _lora_parameters(config, adaptation.lora_rank) if adaptation.lora_rank else 0
    total = decoder + vocabulary + lora
    trainable = vocabulary if adaptation.freeze_non_embeds_params else total
    if adaptation.lora_rank:
        trainable = lora + (vocabulary if adaptation.trains_embeddings_beside_lora else 0)
    largest = max(embedding, head, config.hidden_size * config.intermediate_size // tp)
    return ParameterCounts(total, trainable, num_layers * linear_per_layer + head + lora, largest)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs, by part.

    Attributes:
        step_copies: gradients in fp32, made for the optimizer when activations are gone.
        host: CPU memory of what is offloaded.
        pinned: CPU memory, pinned where there is a GPU, of the copies that a background save writes.
    """

    weights: int = field(default=0, metadata={"label": "weights"})
    gradients: int = field(default=0, metadata={"label": "gradients"})
    master_weights: int = field(default=0, metadata={"label": "fp32 master weights"})
    moments: int = field(default=0, metadata={"label": "optimizer moments"})
    activations: int = field(default=0, metadata={"label": "activations"})
    loss: int = field(default=0, metadata={"label": "logits and loss"})
    communication: int = field(default=0, metadata={"label": "communication buffers"})
    step_copies: int = field(default=0, metadata={"label": "fp32 gradients while stepping"})
    host: int = field(default=0, metadata={"label": "CPU memory, offloaded"})
    pinned: int = field(default=0, metadata={"label": "CPU memory, copies for saves"})

    @property
    def held(self) -> int:
        """Of the device: what every step needs, whatever its rows are."""
        return self.weights + self.gradients + self.master_weights + self.moments

    @property
    def peak(self) -> int:
        """Of the device: what is always held, and the larger of the backward pass and the optimizer step."""
        return self.held + max(self.activations + self.loss + self.communication, self.step_copies)


def device_memory() -> int | None:
    """Bytes that this process can have: of its GPU, or its share of this machine's memory and swap space."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return (sizes["MemTotal"] + sizes["SwapTotal"]) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def memory_in_name(device: str) -> int | None:
    """'NVIDIA H100 80GB HBM3' -> 80 GiB; None for a name without a size."""
    found = re.search(r"(\d+) ?GB\b", device)
    return int(found[1]) * GIB if found else None


def why_too_large(estimates: Sequence[MemoryEstimate], available: int) -> str | None:
    """What is wrong where weights, gradients and optimizer alone are more than `available` bytes."""
    held = max(estimate.held for estimate in estimates)
    if held <= available:
        return None
    return (
        f"weights, gradients and optimizer need {held / GIB:,.1f} GiB in each process, which has "
        f"{available / GIB:,.1f} GiB; use more processes with zero2, gemini or 3d (--tp, --pp), or "
        "gemini_auto, zero2_cpu, --zero_cpu_offload or --lora_rank; --dry_run shows what a choice needs"
    )


def estimate_memory(plugin: Plugin, config: LlamaConfig, stage: int = 0) -> MemoryEstimate:
    """Memory of a process of pipeline stage `stage`, at its fullest."""
    counts = plugin.count_held_parameters(config, stage)
    return MemoryEstimate(
        **plugin.estimate_states(counts),
        pinned=estimate_save_copies(plugin, counts),
        activations=_estimate_activations(plugin, config, stage),
        loss=_estimate_loss(plugin, config) if stage == plugin.layout.pp - 1 else 0,
    )


def estimate_save_copies(plugin: Plugin, counts: ParameterCounts) -> int:
    """Bytes of the copies that a background save writes: this process's share of optimizer and weights.

    Blocks of pinned memory are powers of two: up to twice as much, on average half as much again.
    """
    if not plugin.settings.output.async_save:
        return 0
    replicas = max(1, plugin.layout.world_size // (plugin.layout.tp * plugin.layout.pp))
    slices = replicas if plugin.slices_optimizer else 1
    optimizer = (FP32_BYTES + MOMENT_BYTES) * counts.trainable // slices
    return (optimizer + plugin.parameter_bytes * counts.total // replicas) * 3 // 2


def estimate_sliced_states(
    value: int,
    counts: ParameterCounts,
    shards: int,
    slices_gradients: bool,
    offloads: bool,
    bucket_elements: int,
) -> dict[str, int]:
    """Bytes of low-level ZeRO: weights whole, optimizer state (and gradients) sliced over `shards` processes.

    Args:
        value: bytes of a weight.
        bucket_elements: of gradients that are reduced together.
    """
    trainable = counts.trainable
    shard = -(-trainable // shards)
    # The master of fp32 weights is a copy as well, but its gradient is not.
    step_copies = FP32_BYTES * shard if value < FP32_BYTES or offloads else 0
    bucket = min(trainable, max(bucket_elements, counts.largest))
    on_device = {
        "master_weights": FP32_BYTES * shard,
        "moments": MOMENT_BYTES * shard,
        "step_copies": step_copies,
    }
    return {
        "weights": value * counts.total,
        "gradients": value * (shard if slices_gradients else trainable),
        # The gradients of a bucket, the same in one piece, and this process's part of their sum.
        "communication": value * (2 * bucket + -(-bucket // shards)),
        **({"host": sum(on_device.values())} if offloads else on_device),
    }


def pinned_bytes(sizes: Iterable[int]) -> int:
    """Pinned host memory for blocks of `sizes` bytes: torch rounds each up to a power of two.

    >>> pinned_bytes([4, 5])
    12
    """
    return sum(1 << (size - 1).bit_length() for size in sizes)


def activation_bytes_per_token(plugin: Plugin, config: LlamaConfig) -> int:
    """Bytes that one decoder layer keeps for the backward pass, for each token of its input.

    With width d, d_q = heads x head size, d_kv = key/value heads x head size, MLP width f, sequence length s,
    c bytes a value, r bytes a value of the residual stream (4 under autocast), on one tensor parallel rank:

        two RMSNorms       2 d (4 + r + c)   input in fp32, normalized, output
          autocast         3 c d             a cast copy of the outputs for each of the five projections
        attention          4 c d_q / tp      query, key and value (repeated for grouped queries), output
          flash attention  c (2 d_q + 2 d_kv) / tp      keys and values as they are (flash-attn)
          block mask       c s               a value for every pair of tokens; not with flash attention
        SwiGLU             4 c f / tp        gate, activated gate, up, product

    split_gather splits the norms' sequence over the tensor parallel ranks; all_to_all that of everything.
    """
    layout, value, residual = plugin.layout, plugin.value_bytes, plugin.parameter_bytes
    length = layout.padded_length(plugin.settings.data.max_length)
    queries = config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    flash = plugin.expects_flash(config)
    norms = 2 * config.hidden_size * (FP32_BYTES + residual + value)
    if residual > value:
        norms += 3 * value * config.hidden_size
    kept_keys = keys if flash and not plugin.flash_repeats_keys else queries
    attention = value * (2 * queries + 2 * kept_keys) // layout.tp
    mask = 0 if flash else value * length
    swiglu = 4 * value * config.intermediate_size // layout.tp
    lora = 0
    if plugin.settings.adaptation.lora_rank:
        # Dropout keeps a mask and a dropped-out copy of every adapter's input.
        lora = (value + 1) * sum(inputs for inputs, *_ in projections(config))
    return norms // layout.norm_parts + attention + mask + swiglu + lora


def _tokens_of_pass(plugin: Plugin) -> int:
    return plugin.layout.rows_of_pass * plugin.layout.padded_length(plugin.settings.data.max_length)


def _estimate_activations(plugin: Plugin, config: LlamaConfig, stage: int) -> int:
    layout, tokens = plugin.layout, _tokens_of_pass(plugin)
    per_layer = activation_bytes_per_token(plugin, config)
    layers = layout.layers_of_stages(config.num_hidden_layers)[stage]
    # One forward, one backward: stage k of p has at most p - k microbatches in flight.
    in_flight = min(layout.pp - stage, layout.num_microbatches) if layout.is_pipeline else 1
    if layout.use_grad_checkpoint:
        # The input of every layer; and all of one layer, while that is computed again.
        boundary = layers * plugin.parameter_bytes * config.hidden_size // layout.norm_parts
        total = in_flight * boundary + per_layer
    else:
        total = in_flight * layers * per_layer
    total = total * tokens // layout.sp
    if not plugin.expects_flash(config):
        # The boolean mask itself is made once a pass, for whole rows.
        total += in_flight * tokens * layout.padded_length(plugin.settings.data.max_length)
    return total


def _estimate_loss(plugin: Plugin, config: LlamaConfig) -> int:
    """The head's part: see `llama/loss.py`, which holds the logits of a chunk at a time and gradients in
    fp32.

    Sequence parallel ranks gather the last hidden states: each computes the loss of whole rows.
    """
    from colossal_llama.training.llama.loss import MAX_CHUNK_VALUES

    value, tokens = plugin.value_bytes, _tokens_of_pass(plugin)
    vocabulary = -(-config.vocab_size // plugin.layout.tp)
    if plugin.needs_whole_logits:
        # Log-probabilities and their gradient in fp32, the gradient again in half precision.
        return tokens * vocabulary * (2 * FP32_BYTES + value)
    adaptation = plugin.settings.adaptation
    is_frozen = adaptation.lora_rank and not adaptation.trains_embeddings_beside_lora
    head = 0 if is_frozen else vocabulary * config.hidden_size
    hidden_gradient = value * tokens * config.hidden_size
    chunk = min(tokens, max(1, MAX_CHUNK_VALUES // vocabulary)) * vocabulary
    # The forward pass: logits as computed, in fp32, and their gradient. The backward pass: the head's fp32
    # gradient, scaled, and cast.
    return (
        hidden_gradient
        + FP32_BYTES * head
        + max(
            chunk * (FP32_BYTES + 2 * value),
            (FP32_BYTES + value) * head + FP32_BYTES * tokens * config.hidden_size,
        )
    )
