"""From `--plugin` and the layout to a booster: the one place that knows plugins.

The loop sees the same few methods whatever the plugin: `run_passes` computes gradients of one optimizer step,
`optimizer_step` applies them, `evaluate_pass` computes a loss alone.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.training.arguments import GEMINI_PLUGINS
from colossal_llama.training.attention import has_flash_attn
from colossal_llama.training.model import (
    check_weights_survived,
    install_forwards,
    restore_rotary_frequencies,
    weight_sums,
)
from colossal_llama.training.neftune import EmbeddingNoise

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
# Plugins compute the gradient norm only where they clip; with no clipping asked for, this bound never acts.
NO_CLIPPING = 1e30
INITIAL_LOSS_SCALE = 2.0**16

Batch = dict[str, torch.Tensor]
# Name of a part of a step -> the context that times it.
Phase = Callable[[str], contextlib.AbstractContextManager]


def parameter_dtype(args: argparse.Namespace) -> torch.dtype:
    """Of the model's parameters while training; only ddp keeps fp32 ones beside half precision."""
    return torch.float32 if args.plugin == "ddp" else TORCH_DTYPES[args.mixed_precision]


@dataclass(frozen=True)
class ShardPlace:
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


class Strategy:
    """A boosted model and its optimizer.

    Attributes:
        dp_size, dp_rank: data-parallel size and this process's place: which rows it sees.
        compute_dtype: of the forward and backward pass.
        parameter_dtype: of the model's parameters while training; only ddp keeps fp32 ones beside half
            precision.
        length_multiple: sequence lengths must be a multiple of this.
        loaded_sums: `weight_sums` of the model that was boosted.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        self.compute_dtype = TORCH_DTYPES[args.mixed_precision]
        self.parameter_dtype = parameter_dtype(args)
        self.max_norm = args.grad_clip or NO_CLIPPING
        self.plugin = self._make_plugin()
        from colossalai.booster import Booster

        self.booster = Booster(plugin=self.plugin)
        self.is_pipeline = args.plugin == "3d" and args.pp > 1
        self.can_skip_sync = args.plugin == "ddp" or (args.plugin == "3d" and args.zero_stage < 2)
        self.length_multiple = 1
        self.dp_size, self.dp_rank = dist.get_world_size(), dist.get_rank()
        self.tensor_group = None
        if args.plugin == "3d":
            mesh = self.plugin.pg_mesh
            self.dp_size = mesh.size(self.plugin.dp_axis)
            # numpy's integer, which no torch generator takes for a seed.
            self.dp_rank = int(mesh.coordinate(self.plugin.dp_axis))
            if args.tp > 1:
                self.tensor_group = self.plugin.tp_group
            if args.enable_sequence_parallelism:
                self.length_multiple = args.sp if args.sp_mode == "all_to_all" else args.tp
        self.scaler = None
        if args.plugin == "ddp" and args.mixed_precision == "fp16":
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=INITIAL_LOSS_SCALE)
        self.use_flash = args.use_flash_attn and has_flash_attn() and self.compute_dtype != torch.float32

    def _make_plugin(self) -> Any:
        from colossalai.booster import plugin as plugins

        args = self.args
        on_gpu = self.device.type == "cuda"
        if args.plugin == "ddp":
            return plugins.TorchDDPPlugin()
        if args.plugin in ("zero2", "zero2_cpu"):
            return plugins.LowLevelZeroPlugin(
                stage=2,
                precision=args.mixed_precision,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=self.max_norm,
                overlap_communication=on_gpu,
                cpu_offload=args.plugin == "zero2_cpu",
            )
        if args.plugin in GEMINI_PLUGINS:
            return plugins.GeminiPlugin(
                precision=args.mixed_precision,
                placement_policy="auto" if args.plugin == "gemini_auto" else "static",
                enable_gradient_accumulation=args.accumulation_steps > 1,
                initial_scale=INITIAL_LOSS_SCALE,
                max_norm=self.max_norm,
                enable_flash_attention=False,
                enable_fused_normalization=on_gpu and has_apex_norm(),
            )
        sequence_parallel = args.enable_sequence_parallelism
        plugin = plugins.HybridParallelPlugin(
            tp_size=args.tp,
            pp_size=args.pp,
            sp_size=args.sp if sequence_parallel else None,
            zero_stage=args.zero_stage,
            precision=args.mixed_precision,
            enable_sequence_parallelism=sequence_parallel,
            # colossalai 0.5.0's `ring` linear layers return wrong gradients; `split_gather` shards the
            # sequence over the same ranks and computes the same, so `ring` runs as that.
            sequence_parallelism_mode=("split_gather" if args.sp_mode == "ring" else args.sp_mode)
            if sequence_parallel
            else None,
            enable_flash_attention=False,
            enable_fused_normalization=on_gpu and has_apex_norm(),
            parallel_output=True,
            microbatch_size=args.microbatch_size if args.pp > 1 else None,
            num_microbatches=None,
            # Rows padded to the longest of a batch change shape from pass to pass.
            enable_metadata_cache=args.padding_mode == "max_length",
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=self.max_norm,
            cpu_offload=args.zero_cpu_offload,
            overlap_communication=on_gpu,
        )
        if args.mixed_precision == "fp32":
            # The plugin refuses ZeRO in fp32 by comparing this name, though its optimizer can; nothing else
            # reads it.
            plugin.precision = "float32"
        return plugin

    def boost(self, model: nn.Module, causal_lm: nn.Module, noise: EmbeddingNoise | None) -> None:
        """Hands the model to the plugin and installs what makes all layouts compute the same.

        Args:
            model: `causal_lm` itself, or a PEFT model around it.
        """
        args = self.args
        self.causal_lm, self.peft_model = causal_lm, model
        self.embedding_noise = noise
        if args.use_grad_checkpoint:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
            if args.lora_rank:
                causal_lm.enable_input_require_grads()
        self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
        self.loaded_sums = weight_sums(model)
        optimizer = self._make_optimizer(model)
        self.model, self.optimizer, *_ = self.booster.boost(model, optimizer)
        pipeline_arguments = None
        if self.is_pipeline:
            stages = self.plugin.stage_manager
            layers = stages.distribute_layers(causal_lm.config.num_hidden_layers)
            pipeline_arguments = {
                "stage_manager": stages,
                "stage_index": stages.get_stage_index(layers),
                "shard_config": self.plugin.shard_config,
            }
        ulysses = args.plugin == "3d" and args.enable_sequence_parallelism and args.sp_mode == "all_to_all"
        install_forwards(
            causal_lm,
            self.use_flash,
            ulysses_group=self.plugin.sp_group if ulysses else None,
            vocabulary_group=self.tensor_group,
            pipeline_arguments=pipeline_arguments,
            embedding_noise=noise,
            plain_loss=args.plugin in GEMINI_PLUGINS,
        )
        restore_rotary_frequencies(causal_lm)
        if args.plugin not in GEMINI_PLUGINS:
            self.parameter_names = {parameter: name for name, parameter in model.named_parameters()}
            check_weights_survived(model, self.loaded_sums, self.tensor_group, self.parameter_dtype)
        self._sum_sequence_partial_gradients()
        self._keep_loss_scale_through_step()
        self._settle_gradient_buckets()

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        args = self.args
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {"lr": args.lr, "betas": ADAM_BETAS, "eps": ADAM_EPS, "weight_decay": args.weight_decay}
        if self.device.type == "cuda" and args.plugin != "ddp":
            from colossalai.nn.optimizer import HybridAdam

            return HybridAdam(parameters, adamw_mode=True, **settings)
        return torch.optim.AdamW(parameters, fused=True, **settings)

    def _sum_sequence_partial_gradients(self) -> None:
        """Under split_gather each rank has norm gradients of its part of the sequence; sums them once.

        colossalai sums what has been accumulated so far after every backward pass, so with accumulation
        the first passes are summed again and again. A hook on the gradient itself sums each contribution
        exactly once.
        """
        args = self.args
        if not (
            args.plugin == "3d"
            and args.enable_sequence_parallelism
            and args.sp_mode in ("split_gather", "ring")
        ):
            return

        def sum_over_tensor_group(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self.plugin.tp_group)
            return gradient

        for parameter in self.causal_lm.parameters():
            if getattr(parameter, "partial_derived", False):
                parameter.partial_derived = False
                if parameter.requires_grad:
                    parameter.register_hook(sum_over_tensor_group)

    def _settle_gradient_buckets(self) -> None:
        """Makes DDP arrange its gradient buckets now, by a pass whose gradients are thrown away.

        It arranges them once after the first backward pass. From three ranks on, other buckets mean sums in
        another order, so a resumed run would differ from the one that was never stopped.
        """
        wrapped = (m for m in self.model.modules() if isinstance(m, nn.parallel.DistributedDataParallel))
        ddp = next(wrapped, None)
        if ddp is None or ddp.process_group.size() < 3:
            return
        zeros = torch.zeros((1, 8 * self.length_multiple), dtype=torch.int64, device=self.device)
        batch = dict.fromkeys(("input_ids", "position_ids", "labels", "attention_mask"), zeros)
        noise, self.causal_lm.embedding_noise = self.causal_lm.embedding_noise, None
        self.model.train()
        # Dropout must not use up random numbers here.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self._train_pass(batch, 0.0, contextlib.nullcontext)
        self.optimizer.optim.zero_grad(set_to_none=True)
        self.causal_lm.embedding_noise = noise

    def _keep_loss_scale_through_step(self) -> None:
        """colossalai divides gradients by a loss scale that it may have raised since they were computed.

        Its overflow check updates the scale before the gradients are unscaled; every growth interval one
        step would be half as long. The scale that the backward pass used is remembered instead.
        """
        self._loss_scaling = getattr(self.optimizer, "mixed_precision_mixin", None) or getattr(
            self.optimizer, "mixed_precision", None
        )
        if not hasattr(self._loss_scaling, "grad_scaler"):
            self._loss_scaling = None
            return
        scaling, check_and_update = self._loss_scaling, self._loss_scaling.should_skip_step

        def remember_then_check() -> bool:
            self._used_scale = scaling.loss_scale
            return check_and_update()

        def used_scale() -> float:
            from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import OptimState

            scaling.optim_state = OptimState.UNSCALED
            return self._used_scale

        scaling.should_skip_step = remember_then_check
        scaling.get_grad_div_scale = used_scale

    def to_device(self, batch: dict[str, Any]) -> Batch:
        """The model's arguments of a collated batch, on the device."""
        moved = {
            name: batch[name].to(self.device, non_blocking=True)
            for name in ("input_ids", "position_ids", "labels")
        }
        moved["attention_mask"] = batch["document_index"].to(self.device, non_blocking=True)
        return moved

    def run_passes(
        self, batches: Sequence[Batch], num_labels: int, step: int, phase: Phase = contextlib.nullcontext
    ) -> torch.Tensor:
        """Forward and backward of one optimizer step.

        Args:
            batches: this rank's micro-batches (pipeline: passes).
            num_labels: tokens with loss of the step, over all passes and data-parallel ranks.
            phase: gives the context of "forward" and of "backward" (pipeline: of both together).

        Returns:
            This rank's summed loss, fp32 (pipeline: zero except on the last stage).
        """
        self.model.train()
        if self.embedding_noise is not None:
            self.embedding_noise.start_step(step, self.dp_rank)
        # The plugins average gradients over the data-parallel ranks; with this factor that gives the token
        # mean.
        factor = self.dp_size / max(1, num_labels)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for number, batch in enumerate(batches):
            skip_sync = self.can_skip_sync and number < len(batches) - 1
            context = (
                self.booster.no_sync(self.model, self.optimizer) if skip_sync else contextlib.nullcontext()
            )
            with context:
                total += self._train_pass(batch, factor, phase)
        return total

    def _train_pass(self, batch: Batch, factor: float, phase: Phase) -> torch.Tensor:
        if self.is_pipeline:
            with phase("forward and backward"):
                return self._pipeline_pass(batch, factor)
        with phase("forward"), self._autocast():
            loss_sum = self.model(**batch)["loss_sum"]
        loss = loss_sum * factor
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        with phase("backward"):
            self.booster.backward(loss, self.optimizer)
        return loss_sum.detach()

    def _pipeline_pass(self, batch: Batch, factor: float) -> torch.Tensor:
        num_microbatches = batch["input_ids"].size(0) // self.args.microbatch_size

        def criterion(outputs: dict[str, torch.Tensor], microbatch: Any) -> torch.Tensor:
            # The schedule divides by the number of microbatches.
            return outputs["loss_sum"] * (factor * num_microbatches)

        result = self.booster.execute_pipeline(
            iter([batch]), self.model, criterion, self.optimizer, return_loss=True
        )
        if result["loss"] is None:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return result["loss"].float() / factor

    def evaluate_pass(self, batch: Batch) -> torch.Tensor:
        """Summed loss of a batch, without gradients, noise or dropout (pipeline: zero except on the
        last stage).
        """
        self.model.eval()
        with torch.no_grad():
            if self.is_pipeline:
                # Otherwise the plugin sums gradients of tied embeddings over their stages: there are none.
                with self.booster.no_sync(self.model, self.optimizer):
                    return self._pipeline_pass(batch, 1.0)
            with self._autocast():
                return self.model(**batch)["loss_sum"]

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.args.plugin != "ddp" or self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def optimizer_step(self, learning_rate: float) -> tuple[float, bool]:
        """Clips, steps, clears the gradients.

        Returns:
            The gradient norm before clipping, and whether fp16 overflowed so that the step was left out.
        """
        for group in self.optimizer.optim.param_groups:
            group["lr"] = learning_rate
        if self.args.plugin == "ddp":
            return self._ddp_step()
        self.optimizer.step()
        skipped = False
        norm = float(self.optimizer.get_grad_norm() or 0.0)
        if self._loss_scaling is not None:
            skipped = bool(self._loss_scaling.found_overflow.item() > 0)
            norm /= self._used_scale
        self.optimizer.zero_grad()
        return norm, skipped

    def _ddp_step(self) -> tuple[float, bool]:
        skipped = False
        optimizer = self.optimizer.optim
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_norm))
        if self.scaler is not None:
            before = self.scaler.get_scale()
            self.scaler.step(optimizer)
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped

    def sum_counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Sums [n] over the data-parallel ranks; the ranks of a tensor, pipeline or sequence group
        hold the same.
        """
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        return counts / (dist.get_world_size() // self.dp_size)

    def sum_losses(self, losses: torch.Tensor) -> torch.Tensor:
        """Sums [n] over the data-parallel ranks; all stages of a pipeline but the last hold zeros."""
        losses = losses.to(self.device)
        dist.all_reduce(losses)
        stages = self.args.pp if self.is_pipeline else 1
        return losses / (dist.get_world_size() // self.dp_size // stages)

    def shard_place(self) -> ShardPlace:
        """Not for Gemini, which slices by rules of its own."""
        args = self.args
        tensor = pipeline = 0
        group = None
        if args.plugin == "3d":
            mesh, group = self.plugin.pg_mesh, self.plugin.mixed_dp_group
            tensor, pipeline = mesh.coordinate(self.plugin.tp_axis), mesh.coordinate(self.plugin.pp_axis)
        replica, num_replicas = dist.get_rank(group), dist.get_world_size(group)
        is_sliced = args.plugin.startswith("zero2") or (args.plugin == "3d" and args.zero_stage > 0)
        return ShardPlace(
            tensor,
            pipeline,
            replica,
            num_replicas,
            replica if is_sliced else 0,
            not is_sliced and replica > 0,
        )

    def master_weights(self) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
        """Parameter name -> (parameter of the model, what the optimizer updates: an fp32 master or a slice
        of one).
        """
        optimizer, masters = self.optimizer, {}
        for parameter, name in self.parameter_names.items():
            if not parameter.requires_grad:
                continue
            if hasattr(optimizer, "working_to_master_param"):
                master = optimizer.working_to_master_param.get(id(parameter))
            elif hasattr(optimizer, "working_to_master_map"):
                master = optimizer.working_to_master_map.get(parameter)
            else:
                master = parameter
            if master is not None:
                masters[name] = (parameter, master)
        return masters

    def loss_scale_state(self) -> dict[str, float]:
        """The fp16 loss scaler's state, JSON-able; empty in other precisions."""
        if self.scaler is not None:
            return self.scaler.state_dict()
        if self._loss_scaling is None:
            return {}
        scaler = self._loss_scaling.grad_scaler
        return {
            "scale": scaler.scale.item(),
            "growth_step": scaler._growth_step,
            "hysteresis_step": scaler._hysteresis_step,
        }

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        if not state:
            return
        if self.scaler is not None:
            # Of another plugin's state only the scale is known; the counters start again.
            self.scaler.load_state_dict({**self.scaler.state_dict(), **state})
        elif self._loss_scaling is not None:
            scaler = self._loss_scaling.grad_scaler
            scaler._scale.fill_(state["scale"])
            scaler._growth_step = int(state.get("growth_step", 0))
            scaler._hysteresis_step = int(state.get("hysteresis_step", 0))

    def optimizer_step_count(self, steps: float, parameter: torch.Tensor) -> Any:
        """Adam's step counter in the form that the optimizer keeps: a tensor (torch) or a whole
        number (HybridAdam).
        """
        if isinstance(self.optimizer.optim, torch.optim.AdamW):
            return torch.tensor(steps, dtype=torch.float32, device=parameter.device)
        return int(steps)


def has_apex_norm() -> bool:
    """Whether NVIDIA's apex, which has fused RMSNorm, is installed (another package on the index has
    its name).
    """
    try:
        from apex.normalization import FusedRMSNorm  # noqa: F401
    except ImportError:
        return False
    return True
