"""What a run will do and need, computed before it starts: contradictions, steps, tokens, memory.

Memory is an estimate from formulas, counted the way of Korthikanti et al. 2022 (arXiv:2205.05198, section
4.1: the bytes of every tensor that the backward pass keeps), for LLaMA's layers instead of GPT's: RMSNorm,
rotary embedding, SwiGLU, grouped-query attention, no dropout. Bytes of parameters and optimizer follow
Rajbhandari et al. 2020 (arXiv:1910.02054) and what colossalai's optimizers hold.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from colossal_llama.training.arguments import GEMINI_PLUGINS, WARMUP_RATIO, data_parallel_size
from colossal_llama.training.schedule import FINAL_FRACTION, LearningRateSchedule
from colossal_llama.utils.console import format_table, warn
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.dataset.loader import RowSource

FP32_BYTES = 4
# Adam: a mean and a mean square, both fp32.
MOMENT_BYTES = 8
# colossalai's defaults: elements of a ZeRO reduction bucket, and of the largest chunk that Gemini searches.
ZERO_BUCKET_ELEMENTS = 12 * 1024**2
GEMINI_CHUNK_ELEMENTS = 64 * 1024**2
# colossalai pads a sharded vocabulary to a multiple of this times tp.
VOCABULARY_MULTIPLE = 64
MIB, GIB = 1024**2, 1024**3


def dry_run_world_size(args: argparse.Namespace) -> int:
    """Processes to plan for: WORLD_SIZE, as launchers set it, or the fewest that the layout allows."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return _model_parallel_size(args)
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"WORLD_SIZE={text}: is not a number of processes; set it to 1 or more, or unset it")
    return int(text)


def _model_parallel_size(args: argparse.Namespace) -> int:
    return args.tp * args.pp * args.sp if args.plugin == "3d" else 1


def check_layout(args: argparse.Namespace, config: LlamaConfig, world_size: int) -> list[str]:
    """Contradictions that show only beside the model's configuration or the number of processes.

    Returns:
        A message for each, with flag, value and remedy; empty when the run can start.
    """
    return [*_check_kernels(args), *(_check_3d(args, config, world_size) if args.plugin == "3d" else ())]


def _check_kernels(args: argparse.Namespace) -> list[str]:
    import torch

    from colossal_llama.training.attention import has_flash_attn

    problems = []
    has_gpu = torch.cuda.is_available()
    # A dry run may plan for GPUs on a machine without one.
    if args.plugin in GEMINI_PLUGINS and not has_gpu and not args.dry_run:
        problems.append(
            f"--plugin {args.plugin}: runs on GPUs only, and none is visible; use zero2, ddp or 3d on a CPU"
        )
    if args.use_flash_attn and has_gpu and not has_flash_attn():
        problems.append(
            "--use_flash_attn: the package flash-attn cannot be imported; install it (the README has the "
            "command), or leave the flag out: torch's attention computes the same"
        )
    return problems


def _check_3d(args: argparse.Namespace, config: LlamaConfig, world_size: int) -> list[str]:
    problems = []
    model_parallel = _model_parallel_size(args)
    if world_size % model_parallel:
        problems.append(
            f"--tp {args.tp} --pp {args.pp} --sp {args.sp}: a copy of the model takes {model_parallel} "
            f"processes, but {world_size} were started, which is no multiple of it; start "
            f"{_next_multiple(world_size, model_parallel)} processes or change the layout"
        )
    # all_to_all deals out whole heads: first to tensor parallel ranks, then to sequence parallel ones.
    heads_parts = args.tp * args.sp
    flags = f"--tp {args.tp}" + (f" --sp {args.sp}" if args.sp > 1 else "")
    for name, count in (
        ("attention heads", config.num_attention_heads),
        ("key/value heads", config.num_key_value_heads),
    ):
        if count % heads_parts:
            problems.append(
                f"{flags}: the model's {count} {name} can't be dealt evenly to {heads_parts} processes; "
                f"choose sizes whose product divides {count}"
            )
    if config.intermediate_size % args.tp:
        problems.append(
            f"--tp {args.tp}: the model's MLP width {config.intermediate_size} is no multiple of it; "
            "choose a divisor"
        )
    if args.pp > config.num_hidden_layers:
        problems.append(
            f"--pp {args.pp}: the model has only {config.num_hidden_layers} layers and each stage needs one; "
            f"use --pp {config.num_hidden_layers} or less"
        )
    if args.pp > 2 and args.freeze_non_embeds_params:
        problems.append(
            f"--pp {args.pp}: with --freeze_non_embeds_params the middle stages have nothing to train; "
            "use --pp 2 or 1"
        )
    return problems


def _next_multiple(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a whole model, or of the part of it that one process holds.

    Attributes:
        total: a tied matrix is counted once.
        trainable: those with gradients and optimizer state.
        linear: those of linear layers, the head included; what autocast copies to half precision.
        largest: of the largest tensor.
    """

    total: int
    trainable: int
    linear: int
    largest: int


def count_parameters(config: LlamaConfig) -> int:
    """All parameters of a `LlamaForCausalLM`; a tied embedding is counted once."""
    return _layer_parameters(config, 1)[0] * config.num_hidden_layers + config.hidden_size * (
        1 + config.vocab_size * (1 if config.tie_word_embeddings else 2)
    )


def matrix_parameters(config: LlamaConfig) -> int:
    """N - N_input_embedding: all parameters but the embedding; a tied head multiplies too and is counted."""
    embedding = config.vocab_size * config.hidden_size
    return count_parameters(config) - (0 if config.tie_word_embeddings else embedding)


def head_size(config: LlamaConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _projections(config: LlamaConfig) -> list[tuple[int, int, bool, bool]]:
    """(inputs, outputs, has a bias, tp shards the outputs rather than inputs) of a layer's linear layers."""
    width, mlp = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return [
        (width, queries, attention_bias, True),
        (width, keys, attention_bias, True),
        (width, keys, attention_bias, True),
        (queries, width, attention_bias, False),
        (width, mlp, mlp_bias, True),
        (width, mlp, mlp_bias, True),
        (mlp, width, mlp_bias, False),
    ]


def _layer_parameters(config: LlamaConfig, tp: int) -> tuple[int, int]:
    """(all parameters, those of linear layers) of a decoder layer on one of `tp` processes."""
    linear = sum(
        inputs * outputs // tp + (outputs // (tp if by_outputs else 1) if has_bias else 0)
        for inputs, outputs, has_bias, by_outputs in _projections(config)
    )
    return linear + 2 * config.hidden_size, linear


def _lora_parameters(config: LlamaConfig, rank: int) -> int:
    return config.num_hidden_layers * sum(
        rank * (inputs + outputs) for inputs, outputs, *_ in _projections(config)
    )


def layers_of_stages(num_layers: int, pp: int) -> list[int]:
    """Layers of each pipeline stage, as colossalai deals them: the middle stages get what is left over."""
    layers = [num_layers // pp] * pp
    remainder = num_layers % pp
    first = pp // 2 - remainder // 2
    for stage in range(first, first + remainder):
        layers[stage] += 1
    return layers


def count_held_parameters(args: argparse.Namespace, config: LlamaConfig, stage: int) -> ParameterCounts:
    """Parameters that a process of pipeline stage `stage` holds, before ZeRO shards anything.

    The first stage holds the embedding, the last one the final norm and the head. Under tp the vocabulary is
    padded to a multiple of 64 x tp; the 3d plugin pads the head (and a tied embedding) even without tp.
    """
    tp, pp = args.tp, args.pp
    per_layer, linear_per_layer = _layer_parameters(config, tp)
    num_layers = layers_of_stages(config.num_hidden_layers, pp)[stage]
    is_first, is_last, tied = stage == 0, stage == pp - 1, config.tie_word_embeddings
    rows = rows_padded = config.vocab_size
    if args.plugin == "3d":
        rows_padded = _next_multiple(rows, VOCABULARY_MULTIPLE * tp) // tp
        if tp > 1 or tied:
            rows = rows_padded
    embedding = rows * config.hidden_size if is_first else 0
    head = rows_padded * config.hidden_size if is_last else 0
    vocabulary = embedding if is_first and is_last and tied else embedding + head
    decoder = num_layers * per_layer + (config.hidden_size if is_last else 0)
    lora = _lora_parameters(config, args.lora_rank) if args.lora_rank else 0
    total = decoder + vocabulary + lora
    trainable = vocabulary if args.freeze_non_embeds_params else total
    if args.lora_rank:
        trainable = lora + (vocabulary if args.lora_embeddings == "train" else 0)
    largest = max(embedding, head, config.hidden_size * config.intermediate_size // tp)
    return ParameterCounts(total, trainable, num_layers * linear_per_layer + head + lora, largest)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs, by part.

    Attributes:
        step_copies: gradients in fp32, made for the optimizer when activations are gone.
        host: CPU memory of what is offloaded.
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

    @property
    def peak(self) -> int:
        """Of the device: what is always held, and the larger of the backward pass and the optimizer step."""
        held = self.weights + self.gradients + self.master_weights + self.moments
        return held + max(self.activations + self.loss + self.communication, self.step_copies)


def estimate_memory(
    args: argparse.Namespace, config: LlamaConfig, world_size: int, stage: int = 0
) -> MemoryEstimate:
    """Memory of a process of pipeline stage `stage`, at its fullest."""
    counts = count_held_parameters(args, config, stage)
    states = _estimate_states(args, counts, world_size)
    return MemoryEstimate(
        **states,
        activations=_estimate_activations(args, config, stage),
        loss=_estimate_loss(args, config) if stage == args.pp - 1 else 0,
    )


def _value_bytes(args: argparse.Namespace) -> int:
    return FP32_BYTES if args.mixed_precision == "fp32" else 2


def _estimate_states(args: argparse.Namespace, counts: ParameterCounts, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and what moves them, by plugin."""
    value = _value_bytes(args)
    trainable = counts.trainable
    if args.plugin == "ddp":
        # fp32 weights are their own masters; autocast keeps half-precision copies for the backward pass.
        copies = value * counts.linear if value < FP32_BYTES else 0
        return {
            "weights": FP32_BYTES * counts.total + copies,
            "gradients": FP32_BYTES * trainable,
            "moments": MOMENT_BYTES * trainable,
            "communication": FP32_BYTES * trainable,
        }
    if args.plugin in GEMINI_PLUGINS:
        # Everything is spread over all processes in chunks, as in ZeRO stage 3. A gradient takes the place of
        # its weight; accumulation gives it a chunk of its own. Two whole chunks are gathered at a time.
        shard = -(-counts.total // world_size)
        chunk = min(counts.total, max(GEMINI_CHUNK_ELEMENTS, counts.largest))
        return {
            "weights": value * shard,
            "gradients": value * shard if args.accumulation_steps > 1 else 0,
            "master_weights": FP32_BYTES * shard,
            "moments": MOMENT_BYTES * shard,
            "communication": 2 * value * chunk,
        }
    if args.plugin == "3d" and args.zero_stage == 0:
        is_half = value < FP32_BYTES
        # The pipeline reduces gradients in place; torch's DDP keeps buckets as large as all of them.
        return {
            "weights": value * counts.total,
            "gradients": value * trainable,
            "master_weights": FP32_BYTES * trainable if is_half else 0,
            "moments": MOMENT_BYTES * trainable,
            "communication": value * trainable if args.pp == 1 else 0,
            "step_copies": FP32_BYTES * trainable if is_half else 0,
        }
    # ZeRO shards over all processes that hold the same parameters: sequence parallel ranks are among them.
    shards = world_size // (args.tp * args.pp) if args.plugin == "3d" else world_size
    shard = -(-trainable // shards)
    partitions_gradients = args.plugin != "3d" or args.zero_stage == 2
    offloads = args.plugin == "zero2_cpu" or args.zero_cpu_offload
    # The master of fp32 weights is a copy as well, but its gradient is not.
    step_copies = FP32_BYTES * shard if value < FP32_BYTES or offloads else 0
    bucket = min(trainable, max(ZERO_BUCKET_ELEMENTS, counts.largest))
    on_device = {
        "master_weights": FP32_BYTES * shard,
        "moments": MOMENT_BYTES * shard,
        "step_copies": step_copies,
    }
    return {
        "weights": value * counts.total,
        "gradients": value * (shard if partitions_gradients else trainable),
        # The gradients of a bucket, the same in one piece, and this process's part of their sum.
        "communication": value * (2 * bucket + -(-bucket // shards)),
        **({"host": sum(on_device.values())} if offloads else on_device),
    }


def activation_bytes_per_token(args: argparse.Namespace, config: LlamaConfig) -> int:
    """Bytes that one decoder layer keeps for the backward pass, for each token of its input.

    With width d, d_q = heads x head size, d_kv = key/value heads x head size, MLP width f, sequence length s,
    c bytes a value, r bytes a value of the residual stream (4 under autocast), on one tensor parallel rank:

        two RMSNorms       2 d (4 + r + c)   input in fp32, normalized, output
          autocast         3 c d             a cast copy of the outputs for each of the five projections
        attention          4 c d_q / tp      query, key and value (repeated for grouped queries), output
          flash attention  c (2 d_q + 2 d_kv) / tp      keys and values as they are
          block mask       c s               a value for every pair of tokens; not with flash attention
        SwiGLU             4 c f / tp        gate, activated gate, up, product

    split_gather splits the norms' sequence over the tensor parallel ranks; all_to_all that of everything.
    """
    value = _value_bytes(args)
    residual = FP32_BYTES if args.plugin == "ddp" else value
    length = padded_length(args)
    queries = config.num_attention_heads * head_size(config)
    keys = config.num_key_value_heads * head_size(config)
    norms = 2 * config.hidden_size * (FP32_BYTES + residual + value)
    if residual > value:
        norms += 3 * value * config.hidden_size
    attention = value * (2 * queries + 2 * (keys if _uses_flash(args) else queries)) // args.tp
    mask = 0 if _uses_flash(args) else value * length
    swiglu = 4 * value * config.intermediate_size // args.tp
    lora = 0
    if args.lora_rank:
        # Dropout keeps a mask and a dropped-out copy of every adapter's input.
        lora = (value + 1) * sum(inputs for inputs, *_ in _projections(config))
    return norms // _norm_parts(args) + attention + mask + swiglu + lora


def _uses_flash(args: argparse.Namespace) -> bool:
    return args.use_flash_attn and args.mixed_precision != "fp32"


def _sequence_parts(args: argparse.Namespace) -> int:
    """Parts that `all_to_all` cuts the whole layer's sequence into."""
    return args.sp if args.plugin == "3d" else 1


def _norm_parts(args: argparse.Namespace) -> int:
    shares_tensor_ranks = args.enable_sequence_parallelism and args.sp_mode in ("split_gather", "ring")
    return args.tp if shares_tensor_ranks else 1


def padded_length(args: argparse.Namespace) -> int:
    """Tokens of the longest padded row: sequence parallelism needs a multiple of its parts."""
    return _next_multiple(args.max_length, _sequence_parts(args) * _norm_parts(args))


def _rows_of_pass(args: argparse.Namespace) -> int:
    return args.microbatch_size if args.pp > 1 else args.batch_size


def _estimate_activations(args: argparse.Namespace, config: LlamaConfig, stage: int) -> int:
    tokens = _rows_of_pass(args) * padded_length(args)
    residual = FP32_BYTES if args.plugin == "ddp" else _value_bytes(args)
    per_layer = activation_bytes_per_token(args, config)
    layers = layers_of_stages(config.num_hidden_layers, args.pp)[stage]
    # One forward, one backward: stage k of p has at most p - k microbatches in flight.
    in_flight = 1
    if args.pp > 1:
        in_flight = min(args.pp - stage, args.batch_size // args.microbatch_size)
    if args.use_grad_checkpoint:
        # The input of every layer; and all of one layer, while that is computed again.
        boundary = layers * residual * config.hidden_size // _norm_parts(args)
        total = in_flight * boundary + per_layer
    else:
        total = in_flight * layers * per_layer
    total = total * tokens // _sequence_parts(args)
    if not _uses_flash(args):
        # The boolean mask itself is made once a pass, for whole rows.
        total += in_flight * tokens * padded_length(args)
    return total


def _estimate_loss(args: argparse.Namespace, config: LlamaConfig) -> int:
    """The head's part: see `loss.py`, which holds the logits of a chunk at a time and gradients in fp32.

    Sequence parallel ranks gather the last hidden states: each computes the loss of whole rows.
    """
    from colossal_llama.training.loss import MAX_CHUNK_VALUES

    value = _value_bytes(args)
    tokens = _rows_of_pass(args) * padded_length(args)
    vocabulary = -(-config.vocab_size // args.tp)
    if args.plugin in GEMINI_PLUGINS:
        # Whole logits: log-probabilities and their gradient in fp32, the gradient again in half precision.
        return tokens * vocabulary * (2 * FP32_BYTES + value)
    is_frozen = args.lora_rank and args.lora_embeddings != "train"
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


@dataclass
class TrainingPlan:
    """What a run will do.

    Attributes:
        dp_size: processes that see different rows.
        rows: of the data set; `tail_rows` of them, too few for a step, are left out of each epoch.
        rows_per_step: over all processes and accumulated passes.
        total_steps: optimizer steps of the whole schedule; `planned_steps` of them run under --max_steps.
        tokens_per_epoch: padding not counted, rows left out not counted (at the data's mean row length).
        parameters: of the whole model; `trainable` have gradients.
        memory: one estimate for each pipeline stage.
    """

    world_size: int
    dp_size: int
    rows: int
    rows_per_step: int
    steps_per_epoch: int
    total_steps: int
    planned_steps: int
    tail_rows: int
    tokens_per_epoch: int
    warmup_steps: int
    schedule: LearningRateSchedule
    parameters: ParameterCounts
    memory: list[MemoryEstimate]

    @property
    def tokens_per_step(self) -> float:
        return self.tokens_per_epoch / self.steps_per_epoch


def make_plan(
    args: argparse.Namespace, config: LlamaConfig, source: RowSource, world_size: int
) -> TrainingPlan:
    """Computes the plan; doubtful settings that are no errors are warned of.

    Raises:
        UserError: there are fewer rows than one optimizer step takes.
    """
    dp_size = data_parallel_size(args, world_size)
    rows, rows_per_step = len(source), args.batch_size * args.accumulation_steps * dp_size
    steps_per_epoch = rows // rows_per_step
    if steps_per_epoch == 0:
        flag = f"--num_samples {rows}" if args.benchmark else "--dataset"
        raise UserError(
            f"{flag}: {rows:,} rows, but one optimizer step takes {rows_per_step:,} "
            f"(--batch_size {args.batch_size} x --accumulation_steps {args.accumulation_steps} x {dp_size} "
            f"data-parallel processes); give at least {rows_per_step:,} rows, or lower --accumulation_steps"
        )
    total_steps = steps_per_epoch * args.num_epochs
    warmup_steps = int(total_steps * WARMUP_RATIO) if args.warmup_steps is None else args.warmup_steps
    for message in _doubts(args, config, warmup_steps, total_steps):
        warn(message)
    used_rows = steps_per_epoch * rows_per_step
    whole = argparse.Namespace(**{**vars(args), "plugin": "ddp", "tp": 1, "pp": 1})
    return TrainingPlan(
        world_size=world_size,
        dp_size=dp_size,
        rows=rows,
        rows_per_step=rows_per_step,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        planned_steps=total_steps if args.max_steps < 0 else min(args.max_steps, total_steps),
        tail_rows=rows - used_rows,
        tokens_per_epoch=round(source.num_tokens * used_rows / rows),
        warmup_steps=warmup_steps,
        schedule=LearningRateSchedule(args.lr, warmup_steps, total_steps),
        parameters=count_held_parameters(whole, config, 0),
        memory=[estimate_memory(args, config, world_size, stage) for stage in range(args.pp)],
    )


def _doubts(args: argparse.Namespace, config: LlamaConfig, warmup_steps: int, total_steps: int) -> list[str]:
    import torch

    doubts = []
    if args.max_length > config.max_position_embeddings:
        doubts.append(
            f"--max_length {args.max_length}: the model was made for {config.max_position_embeddings} "
            "positions; it sees later ones for the first time"
        )
    if warmup_steps >= total_steps:
        doubts.append(
            f"--warmup_steps {warmup_steps}: the run has {total_steps} steps, so the learning rate only rises"
        )
    if args.plugin in GEMINI_PLUGINS and not torch.cuda.is_available():
        doubts.append(f"--plugin {args.plugin}: runs on GPUs only, and this machine shows none")
    return doubts


def global_batch_line(plan: TrainingPlan, args: argparse.Namespace) -> str:
    """The first log line of a run."""
    return (
        f"Global batch: {plan.rows_per_step:,} rows (batch_size {args.batch_size} x accumulation_steps "
        f"{args.accumulation_steps} x {plan.dp_size} data-parallel processes), "
        f"{plan.rows_per_step * args.max_length:,} tokens when rows are full, about "
        f"{plan.tokens_per_step:,.0f} with these"
    )


def format_plan(plan: TrainingPlan, args: argparse.Namespace) -> str:
    """The plan as tables: the run, and the memory of a process by part."""
    return "\n\n".join([_format_run(plan, args), _format_memory(plan, args)])


def _format_run(plan: TrainingPlan, args: argparse.Namespace) -> str:
    layout = args.plugin
    if args.plugin == "3d":
        layout = f"3d, tp {args.tp} x pp {args.pp} x sp {args.sp}, ZeRO stage {args.zero_stage}"
    rows: list[tuple[str, object]] = [
        ("parameters", plan.parameters.total),
        ("of them trained", plan.parameters.trainable),
        ("processes", plan.world_size),
        ("plugin and layout", layout),
        ("precision", args.mixed_precision),
        ("data-parallel processes", plan.dp_size),
        ("rows of the data", plan.rows),
        ("rows of a step", plan.rows_per_step),
        ("tokens of a step, about", round(plan.tokens_per_step)),
        ("steps of an epoch", plan.steps_per_epoch),
        ("rows left out of each epoch", plan.tail_rows),
        ("epochs", args.num_epochs),
        ("steps of the schedule", plan.total_steps),
        ("warm-up steps", plan.warmup_steps),
        ("learning rate", f"{args.lr:g} down to {args.lr * FINAL_FRACTION:g}"),
    ]
    if plan.planned_steps != plan.total_steps:
        rows.append(("steps of this run (--max_steps)", plan.planned_steps))
    rows.append(("tokens of this run, about", round(plan.tokens_per_step * plan.planned_steps)))
    return format_table(("plan", ""), rows)


def _format_memory(plan: TrainingPlan, args: argparse.Namespace) -> str:
    peaks = [estimate.peak for estimate in plan.memory]
    shown = sorted({0, peaks.index(max(peaks)), len(peaks) - 1})
    unit, unit_name = (GIB, "GiB") if max(peaks) >= GIB else (MIB, "MiB")
    header = [f"memory of a process ({unit_name}, estimated)"]
    header += [f"stage {stage + 1} of {len(peaks)}" if len(peaks) > 1 else "" for stage in shown]
    rows = []
    for part in fields(MemoryEstimate):
        values = [getattr(plan.memory[stage], part.name) / unit for stage in shown]
        if any(values) and part.name != "host":
            rows.append([part.metadata["label"], *(f"{value:,.2f}" for value in values)])
    rows.append(["at its fullest", *(f"{peaks[stage] / unit:,.2f}" for stage in shown)])
    hosts = [plan.memory[stage].host / unit for stage in shown]
    if any(hosts):
        rows.append(["CPU memory, offloaded", *(f"{value:,.2f}" for value in hosts)])
    notes = [
        "Counted tensor by tensor (after Korthikanti et al. 2022); kernels' workspaces, CUDA itself and",
        "fragmentation come on top: leave a tenth of the device free.",
    ]
    if any(estimate.step_copies for estimate in plan.memory):
        notes.append(
            "fp32 gradients while stepping exist when activations, loss and communication buffers are gone."
        )
    if args.plugin == "gemini_auto":
        notes.append("gemini_auto moves to the CPU what does not fit.")
    return "\n".join([format_table(header, rows), *notes])
