"""Plugin: what `--plugin` chooses, and all that the rest of the suite asks of it.

Before a run a plugin says what it can't be combined with and what memory it takes. In a run it boosts the
model, and the loop sees the same few methods whatever the plugin: `run_passes` computes the gradients of one
optimizer step, `optimizer_step` applies them, `evaluate_pass` computes a loss alone. A checkpoint asks where
its optimizer state lives.
"""

from __future__ import annotations

import contextlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.model.dtypes import torch_dtype
from colossal_llama.training.layout import Layout
from colossal_llama.training.llama.adapters import is_embedding
from colossal_llama.training.llama.compiling import compile_layers, why_no_compiling
from colossal_llama.training.llama.embedding_noise import EmbeddingNoise
from colossal_llama.training.llama.flash import FlashKernel, find_flash_kernel, why_no_flash
from colossal_llama.training.llama.new_rows import (
    NewRowValues,
    decay_before_steps,
    local_values,
    mask_gradients,
)
from colossal_llama.training.memory import FP32_BYTES, ParameterCounts, count_held_parameters, head_size
from colossal_llama.training.plugins.groups import parameter_groups, set_learning_rates
from colossal_llama.training.settings import RunSettings
from colossal_llama.upstream.loss_scale import BackwardLossScale
from colossal_llama.upstream.packed_attention import find_packed_attention

if TYPE_CHECKING:
    from transformers import LlamaConfig

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
# Plugins compute the gradient norm only where they clip; with no clipping asked for, this bound never acts.
NO_CLIPPING = 1e30
INITIAL_LOSS_SCALE = 2.0**16
# NVIDIA's GPUs from Ampere on.
BF16_CAPABILITY = (8, 0)

Batch = dict[str, torch.Tensor]
# Name of a part of a step -> the context that times it.
Phase = Callable[[str], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class ShardCoordinates:
    """What of the model and the optimizer this process holds.

    Attributes:
        replica, num_replicas: its place among the processes that compute with the same weights.
        zero_rank: its slice of the optimizer's parameters; 0 where they are not sliced.
        is_replica: another process holds the same optimizer state, and writes it.
    """

    tensor_rank: int
    pipeline_rank: int
    replica: int
    num_replicas: int
    zero_rank: int
    is_replica: bool

    @property
    def file_name(self) -> str:
        """File of the optimizer shard."""
        return f"tp-{self.tensor_rank:03d}_pp-{self.pipeline_rank:03d}_zero-{self.zero_rank:04d}.safetensors"


class Plugin(ABC):
    """A way to train on several processes: the base of every plugin.

    Args:
        world_size: processes of the run.

    Attributes:
        splits_model: `--tp`, `--pp`, `--sp` and what goes with them are for this plugin.
        autocasts: parameters stay fp32 and are cast where they are used, instead of being half precision.
        needs_whole_logits: the output matrix must be used by ordinary torch operations, so the loss can't be
            computed chunk by chunk.
        row_losses: where it is a list, each pass of training adds the summed loss of its rows, [rows], on the
            device (pipeline: of a microbatch's, on the last stage). Set before `boost`.
        spreads_weights: no process has whole weights, so all of them take part when one gathers some.
        pads_vocabulary: rows are added to the embeddings that it splits.
        compiles: `--compile` is for this plugin.
        new_ids: the embedding rows that alone train; None where rows are not told apart. Set before boosting.

    After `boost`:
        causal_lm, peft_model, model, optimizer: the LLaMA, it or the PEFT model around it, and both as
        boosted.
        parameter_names: names by parameter.
        loaded_sums: `weight_sums` of the model that was boosted.
        tensor_group: process group that the vocabulary is split over; None where it is whole.
        dp_rank: this process's place among those that see different rows.
    """

    name: ClassVar[str]
    splits_model: ClassVar[bool] = False
    autocasts: ClassVar[bool] = False
    pads_vocabulary: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    needs_whole_logits: ClassVar[bool] = False
    spreads_weights: ClassVar[bool] = False

    def __init__(self, settings: RunSettings, world_size: int) -> None:
        self.settings = settings
        self.layout: Layout = settings.layout.on(world_size)
        self.row_losses: list[torch.Tensor] | None = None
        self.new_ids: range | None = None

    # ------------------------------------------------------------------ before a run

    def conflicts(self) -> list[str]:
        """Flags that this plugin can't be combined with, each with its remedy."""
        layout, problems = self.settings.layout, []
        if layout.compile and not self.compiles:
            problems.append(
                f"--compile: {self.name} not tested with compiled layers; use zero2 or ddp, or leave it out"
            )
        if self.splits_model:
            return problems
        for flag in ("tp", "pp", "sp"):
            if (size := getattr(layout, flag)) > 1:
                problems.append(f"--{flag} {size}: only the 3d plugin splits models; add --plugin 3d")
        for flag, other in (("enable_sequence_parallelism", ""), ("zero_cpu_offload", " (or use zero2_cpu)")):
            if getattr(layout, flag):
                problems.append(f"--{flag}: only for --plugin 3d{other}")
        return problems

    def model_conflicts(self, config: LlamaConfig) -> list[str]:
        """What shows only beside the model's configuration, the number of processes or the machine."""
        problems = self.layout.problems(config)
        if self.layout.compile and (reason := why_no_compiling()):
            problems.append(f"--compile: {reason}")
        return problems

    def doubts(self) -> list[str]:
        """What is no error, but worth a warning."""
        return []

    def gpu_doubts(self, config: LlamaConfig) -> list[str]:
        """What this machine's GPU does slowly; nothing where there is none."""
        if not torch.cuda.is_available():
            return []
        capability, doubts = torch.cuda.get_device_capability(), []
        if self.compute_dtype == torch.bfloat16 and capability < BF16_CAPABILITY:
            found, needed = (".".join(map(str, each)) for each in (capability, BF16_CAPABILITY))
            doubts.append(
                f"--mixed_precision bf16: this GPU has compute capability {found}; bf16 is emulated below "
                f"{needed}, slowly; use fp16"
            )
        if self.asks_for_flash and (reason := why_no_flash(capability, head_size(config))):
            doubts.append(f"--use_flash_attn: {reason}; torch's attention computes the same, slowly")
        return doubts

    def describe_layout(self) -> str:
        """For tables: the plugin, and the sizes that it uses."""
        return self.name

    @property
    def value_bytes(self) -> int:
        """Of a weight or an activation in the forward pass."""
        return FP32_BYTES if self.layout.mixed_precision == "fp32" else 2

    @property
    def parameter_bytes(self) -> int:
        """Of a parameter, and of a value of the residual stream."""
        return FP32_BYTES if self.autocasts else self.value_bytes

    @property
    def asks_for_flash(self) -> bool:
        """Whether flash attention was asked for, in a precision that it knows."""
        return self.layout.use_flash_attn and self.layout.mixed_precision != "fp32"

    def expects_flash(self, config: LlamaConfig) -> bool:
        """Whether a run will have flash attention: where the GPU is not this machine's, it is taken to."""
        if not self.asks_for_flash or not torch.cuda.is_available():
            return self.asks_for_flash
        return why_no_flash(torch.cuda.get_device_capability(), head_size(config)) is None

    @property
    def flash_repeats_keys(self) -> bool:
        """Whether keys and values are repeated for grouped queries, as torch's own kernel may need."""
        if not torch.cuda.is_available() or importlib.util.find_spec("flash_attn") is not None:
            return False
        return find_packed_attention().repeats_keys

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the forward and backward pass."""
        return torch_dtype(self.layout.mixed_precision)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of the model's parameters, in memory and where they are saved."""
        return torch.float32 if self.autocasts else self.compute_dtype

    def count_held_parameters(self, config: LlamaConfig, stage: int = 0) -> ParameterCounts:
        """Parameters that a process of a pipeline stage holds, before ZeRO shards anything."""
        return count_held_parameters(
            config, self.settings.adaptation, self.layout, stage, self.pads_vocabulary
        )

    def memory_notes(self) -> list[str]:
        """Sentences for below the table of memory."""
        return []

    @abstractmethod
    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        """Bytes of weights, gradients, optimizer state and what moves them: fields of `MemoryEstimate`."""

    # ------------------------------------------------------------------ boosting

    def start(self) -> None:
        """Makes colossalai's plugin; the process group is there."""
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.max_norm = self.settings.optimizer.grad_clip or NO_CLIPPING
        self.dp_rank = dist.get_rank()
        self.tensor_group: Any = None
        self.booster_plugin = self.make_booster_plugin()
        from colossalai.booster import Booster

        self.booster = Booster(plugin=self.booster_plugin)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def tensor_rank(self) -> int:
        """This process's part of what is split by tensor parallelism, the vocabulary among it."""
        return 0 if self.tensor_group is None else dist.get_rank(self.tensor_group)

    @abstractmethod
    def make_booster_plugin(self) -> Any:
        """colossalai's plugin, with the settings of this run."""

    def choose_attention(self, config: LlamaConfig) -> None:
        """Finds the kernel for `--use_flash_attn`; `flash_problems`: of the kernels that come before it."""
        self.flash: FlashKernel | None = None
        self.flash_problems: tuple[str, ...] = ()
        if not self.asks_for_flash or not self.on_gpu:
            return
        if why_no_flash(torch.cuda.get_device_capability(), head_size(config)) is not None:
            return  # the plan has warned
        parts = self.layout.tp * self.layout.sp
        self.flash, self.flash_problems = find_flash_kernel(
            config.num_attention_heads // parts,
            config.num_key_value_heads // parts,
            head_size(config),
            self.compute_dtype,
            self.device,
            self.settings.optimizer.deterministic,
        )

    def make_optimizer(self, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW over the parameters that train, in their groups: torch's own on every device. Those of
        colossalai are compiled at their first use, which needs nvcc.
        """
        return torch.optim.AdamW(parameters, fused=True, **self.adam_settings)

    @property
    def adam_settings(self) -> dict[str, Any]:
        wanted = self.settings.optimizer
        return {"lr": wanted.lr, "betas": ADAM_BETAS, "eps": ADAM_EPS, "weight_decay": wanted.weight_decay}

    def boost(self, model: nn.Module, causal_lm: nn.Module, noise: EmbeddingNoise | None) -> None:
        """Hands the model to colossalai and installs what makes all layouts compute the same.

        Args:
            model: `causal_lm` itself, or a PEFT model around it.
        """
        from colossal_llama.training.llama.forward import install_forwards
        from colossal_llama.training.llama.weight_checks import weight_sums
        from colossal_llama.upstream.rotary_frequencies import restore_rotary_frequencies
        from colossal_llama.upstream.rotary_lengths import rotate_documents_alone

        self.causal_lm, self.peft_model = causal_lm, model
        self.embedding_noise = noise
        self.choose_attention(causal_lm.config)
        if self.layout.use_grad_checkpoint:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            if self.settings.adaptation.lora_rank:
                causal_lm.enable_input_require_grads()
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.loaded_sums = weight_sums(model)
        if self.new_ids is not None:
            mask_gradients(causal_lm, self.new_ids, self.tensor_rank)
        optimizer = self.make_optimizer(parameter_groups(model, self.settings.adaptation))
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        install_forwards(
            causal_lm,
            self.flash,
            ulysses_group=self.ulysses_group,
            vocabulary_group=self.tensor_group,
            pipeline_arguments=self.pipeline_arguments(),
            embedding_noise=noise,
            plain_loss=self.needs_whole_logits,
            row_losses=self.row_losses,
        )
        restore_rotary_frequencies(causal_lm)
        rotate_documents_alone(causal_lm)
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.check_weights()
        self.loss_scale = BackwardLossScale.find(self.optimizer)
        if self.new_ids is not None and self.settings.adaptation.decays("embeddings"):
            weight_decay = self.settings.optimizer.weight_decay
            decay_before_steps(self.optimizer.optim, self.new_row_values(), weight_decay)
        self.after_boost()
        if self.layout.compile:
            lengths_vary = self.settings.data.padding_mode == "longest"
            compile_layers(causal_lm, lengths_vary, uses_flash=self.flash is not None)

    def check_weights(self) -> None:
        """Raises RuntimeError where the boosted model lost weights that it was loaded with."""
        from colossal_llama.training.llama.weight_checks import check_weights_survived

        check_weights_survived(self.peft_model, self.loaded_sums, self.tensor_group, self.parameter_dtype)

    def after_boost(self) -> None:  # noqa: B027 - most add nothing
        """What a plugin adds to the boosted model."""

    @property
    def ulysses_group(self) -> Any:
        """Process group of `all_to_all` sequence parallelism."""
        return None

    def pipeline_arguments(self) -> dict[str, Any] | None:
        """What the forward of a pipeline stage needs; None where the model is whole."""
        return None

    # ------------------------------------------------------------------ a step

    def to_device(self, batch: dict[str, Any]) -> Batch:
        """The model's arguments of a collated batch, on the device."""
        moved = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in ("input_ids", "position_ids", "labels")
        }
        moved["attention_mask"] = batch["document_index"].to(self.device, non_blocking=True)
        return moved

    @property
    def can_skip_sync(self) -> bool:
        """Whether gradients may stay unreduced until the last pass of a step."""
        return False

    def run_passes(
        self, batches: Sequence[Batch], num_labels: int, step: int, phase: Phase = contextlib.nullcontext
    ) -> torch.Tensor:
        """Forward and backward of one optimizer step.

        Args:
            batches: this rank's micro-batches (pipeline: passes).
            num_labels: tokens with loss of the step, over all passes and data-parallel ranks.
            phase: the context of "forward" and of "backward" (pipeline: of both together).

        Returns:
            This rank's summed loss, fp32 (pipeline: zero except on the last stage).
        """
        self.model.train()
        if self.embedding_noise is not None:
            self.embedding_noise.start_step(step, self.dp_rank)
        # The plugins average gradients over the data-parallel ranks; with this factor that is the token mean.
        factor = self.layout.dp_size / max(1, num_labels)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, batch in enumerate(batches):
            skip_sync = self.can_skip_sync and number < len(batches) - 1
            context = (
                self.booster.no_sync(self.model, self.optimizer) if skip_sync else contextlib.nullcontext()
            )
            with context:
                total += self.train_pass(batch, factor, phase)
        return total

    def train_pass(self, batch: Batch, factor: float, phase: Phase) -> torch.Tensor:
        """Forward and backward of one micro-batch; gradients are of the summed loss times `factor`."""
        with phase("forward"), self.autocast():
            loss_sum = self.model(**batch)["loss_sum"]
        loss = self.scale_loss(loss_sum * factor)
        with phase("backward"):
            self.booster.backward(loss, self.optimizer)
        return loss_sum.detach()

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss whose gradients are taken; colossalai's optimizers scale by themselves."""
        return loss

    def evaluate_pass(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a batch, without gradients, noise or dropout (pipeline: zero except on the
        last stage).
        """
        self.model.eval()
        with torch.no_grad(), self.autocast():
            return self.model(**batch)["loss_sum"]

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self.autocasts or self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def optimizer_step(
        self, learning_rate: float, embeddings_rate: float | None = None
    ) -> tuple[float, bool]:
        """Clips, steps, clears the gradients.

        Args:
            embeddings_rate: learning rate of the embeddings where they have one of their own.

        Returns:
            The gradient norm before clipping, and whether fp16 overflowed so that the step was left out.
        """
        set_learning_rates(self.optimizer.optim, learning_rate, embeddings_rate)
        self.optimizer.step()
        skipped = False
        norm = float(self.optimizer.get_grad_norm() or 0.0)
        if self.loss_scale is not None:
            skipped = self.loss_scale.found_overflow
            # Of a step that was left out, colossalai returns the norm of the one before.
            norm = float("inf") if skipped else norm / self.loss_scale.used
        self.optimizer.zero_grad()
        return norm, skipped

    def sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Sums [n] over the data-parallel ranks; the ranks of a tensor, pipeline or sequence group
        hold the same.
        """
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        return counts / (self.layout.world_size // self.layout.dp_size)

    def sum_losses(self, losses: torch.Tensor) -> torch.Tensor:
        """Sums [n] over the data-parallel ranks; all stages of a pipeline but the last hold zeros."""
        losses = losses.to(self.device)
        dist.all_reduce(losses)
        return losses / (self.layout.world_size // self.layout.dp_size // self.layout.pp)

    # ------------------------------------------------------------------ state in a checkpoint

    @property
    def slices_optimizer(self) -> bool:
        """Whether each data-parallel rank holds a slice of the optimizer's state (ZeRO)."""
        return False

    def shard_coordinates(self) -> ShardCoordinates:
        """Which part of the weights and of the optimizer's state this process has."""
        return self._coordinates_in(None, tensor_rank=0, pipeline_rank=0)

    def _coordinates_in(self, group: Any, tensor_rank: int, pipeline_rank: int) -> ShardCoordinates:
        """`group`: the processes that compute with the same weights."""
        replica, num_replicas = dist.get_rank(group), dist.get_world_size(group)
        return ShardCoordinates(
            tensor_rank,
            pipeline_rank,
            replica,
            num_replicas,
            replica if self.slices_optimizer else 0,
            not self.slices_optimizer and replica > 0,
        )

    def master_weights(self) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
        """Parameter name -> (parameter of the model, what the optimizer updates: an fp32 master or a slice
        of one).
        """
        masters = {}
        for parameter, name in self.parameter_names.items():
            if not parameter.requires_grad:
                continue
            master = self.master_of(parameter)
            if master is not None:
                masters[name] = (parameter, master)
        return masters

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """What the optimizer updates for a parameter; None where another process does it."""
        return parameter

    def slice_offset(self, parameter: nn.Parameter) -> int | None:
        """Where this process's slice begins in the flattened parameter; None where all processes have
        slices of one length, in the order of their ranks.
        """
        return None

    def slice_begin(self, parameter: nn.Parameter, master: torch.Tensor) -> int:
        """Where `master` begins in the flattened parameter, or part of it, that it is a slice of."""
        offset = self.slice_offset(parameter)
        return self.shard_coordinates().zero_rank * master.numel() if offset is None else offset

    def new_row_values(self) -> list[NewRowValues]:
        """Where the new rows are in what this process's optimizer updates."""
        assert self.new_ids is not None
        found = []
        for name, (parameter, master) in self.master_weights().items():
            if is_embedding(name):
                begin, size = self.slice_begin(parameter, master), master.numel()
                values = local_values(self.new_ids, parameter.shape, self.tensor_rank, begin, size)
                found.append(NewRowValues(master, values))
        return found

    def loss_scale_state(self) -> dict[str, float]:
        """The fp16 loss scaler's state, JSON-able; empty in other precisions."""
        return {} if self.loss_scale is None else self.loss_scale.state()

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        if state and self.loss_scale is not None:
            self.loss_scale.load_state(state)

    def optimizer_step_count(self, steps: float, parameter: torch.Tensor) -> Any:
        """Adam's step counter in the form that the optimizer keeps: a tensor (torch) or a whole
        number (HybridAdam).
        """
        if isinstance(self.optimizer.optim, torch.optim.AdamW):
            return torch.tensor(steps, dtype=torch.float32, device=parameter.device)
        return int(steps)

    def gather_weights(self, parameters: Iterable[nn.Parameter]) -> Iterator[torch.Tensor]:
        """The whole weights one after the other, in the order of `parameters`.

        Processes that hold parts of one another's weights call it together: those of a tensor parallel
        group, and all of them where the plugin `spreads_weights`.
        """
        from colossalai.checkpoint_io.utils import gather_distributed_param

        for parameter in parameters:
            yield gather_distributed_param(parameter, keep_vars=False)


def has_apex_norm() -> bool:
    """Whether NVIDIA's apex, which has fused RMSNorm, is installed (another package on the index has
    its name).
    """
    try:
        from apex.normalization import FusedRMSNorm  # noqa: F401
    except ImportError:
        return False
    return True
