"""`3d`: tensor, pipeline and sequence parallelism, with ZeRO over the data-parallel processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colossal_llama.training.layout import TENSOR_GROUP_MODES
from colossal_llama.training.memory import (
    FP32_BYTES,
    MOMENT_BYTES,
    ParameterCounts,
    estimate_sliced_states,
)
from colossal_llama.training.plugins.base import (
    INITIAL_LOSS_SCALE,
    Batch,
    Phase,
    Plugin,
    ShardCoordinates,
    has_apex_norm,
)
from colossal_llama.training.plugins.zero import ZERO_BUCKET_ELEMENTS, zero_master
from colossal_llama.upstream.ddp_bucket_order import settle_gradient_buckets
from colossal_llama.upstream.empty_parameter_groups import allow_empty_groups
from colossal_llama.upstream.ring_sequence_parallelism import working_mode
from colossal_llama.upstream.split_gather_gradients import sum_partial_gradients_once
from colossal_llama.upstream.zero_beside_ddp import take_ddp_off
from colossal_llama.upstream.zero_fp32 import allow_fp32


class HybridPlugin(Plugin):
    """colossalai's HybridParallelPlugin."""

    name = "3d"
    splits_model = True
    pads_vocabulary = True

    # ------------------------------------------------------------------ before a run

    def conflicts(self) -> list[str]:
        layout, adaptation = self.settings.layout, self.settings.adaptation
        problems = [*super().conflicts(), *self._pipeline_conflicts()]
        if layout.zero_cpu_offload and layout.zero_stage == 0:
            problems.append("--zero_cpu_offload: needs --zero_stage 1 or 2")
        if adaptation.lora_rank and (layout.tp > 1 or layout.pp > 1 or layout.enable_sequence_parallelism):
            problems.append(
                "--lora_rank: LoRA is for data parallel layouts; use --tp 1 --pp 1 without sequence "
                "parallelism"
            )
        return [*problems, *self._sequence_conflicts()]

    def _pipeline_conflicts(self) -> list[str]:
        layout, problems = self.layout, []
        if not layout.is_pipeline:
            return problems
        if layout.batch_size % layout.microbatch_size:
            problems.append(
                f"--batch_size {layout.batch_size}: with --pp {layout.pp} it is cut into microbatches of "
                f"--microbatch_size {layout.microbatch_size} and must be a multiple of it"
            )
        elif layout.num_microbatches < layout.pp:
            problems.append(
                f"--batch_size {layout.batch_size}: {layout.num_microbatches} microbatches "
                f"of {layout.microbatch_size}, but {layout.pp} stages need at least {layout.pp}; "
                f"use --batch_size {layout.pp * layout.microbatch_size} or more"
            )
        if layout.zero_stage == 2:
            problems.append(f"--zero_stage 2: can't be combined with --pp {layout.pp}; use --zero_stage 1")
        return problems

    def _sequence_conflicts(self) -> list[str]:
        layout, mode = self.layout, self.layout.sp_mode
        if not layout.enable_sequence_parallelism:
            if layout.sp > 1:
                return [f"--sp {layout.sp}: needs --enable_sequence_parallelism and --sp_mode all_to_all"]
            return []
        if mode in TENSOR_GROUP_MODES:
            problems = []
            if layout.tp == 1:
                problems.append(
                    f"--sp_mode {mode}: splits the sequence over the tensor parallel ranks; needs --tp 2+"
                )
            if layout.sp > 1:
                problems.append(f"--sp {layout.sp}: {mode} uses the tensor parallel group; leave --sp at 1")
            return problems
        if mode == "ring_attn":
            return [
                "--sp_mode ring_attn: needs flash-attn's kernels and can't isolate documents; "
                "use all_to_all or split_gather"
            ]
        if layout.sp == 1:
            return [f"--sp 1: {mode} splits the sequence over --sp ranks; use --sp 2 or more"]
        return []

    def describe_layout(self) -> str:
        layout = self.layout
        return f"3d, tp {layout.tp} x pp {layout.pp} x sp {layout.sp}, ZeRO stage {layout.zero_stage}"

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        layout, value, trainable = self.layout, self.value_bytes, counts.trainable
        if layout.zero_stage == 0:
            is_half = value < FP32_BYTES
            # The pipeline reduces gradients in place; torch's DDP keeps buckets as large as all of them.
            return {
                "weights": value * counts.total,
                "gradients": value * trainable,
                "master_weights": FP32_BYTES * trainable if is_half else 0,
                "moments": MOMENT_BYTES * trainable,
                "communication": value * trainable if not layout.is_pipeline else 0,
                "step_copies": FP32_BYTES * trainable if is_half else 0,
            }
        return estimate_sliced_states(
            value,
            counts,
            # Over all processes that hold the same parameters: sequence parallel ranks are among them.
            shards=layout.world_size // (layout.tp * layout.pp),
            slices_gradients=layout.zero_stage == 2,
            offloads=layout.zero_cpu_offload,
            bucket_elements=ZERO_BUCKET_ELEMENTS,
        )

    # ------------------------------------------------------------------ boosting

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import HybridParallelPlugin

        layout = self.layout
        sequence_parallel = layout.enable_sequence_parallelism
        plugin = HybridParallelPlugin(
            tp_size=layout.tp,
            pp_size=layout.pp,
            sp_size=layout.sp if sequence_parallel else None,
            zero_stage=layout.zero_stage,
            precision=layout.mixed_precision,
            enable_sequence_parallelism=sequence_parallel,
            sequence_parallelism_mode=working_mode(layout.sp_mode) if sequence_parallel else None,
            enable_flash_attention=False,
            enable_fused_normalization=self.on_gpu and has_apex_norm(),
            parallel_output=True,
            microbatch_size=layout.microbatch_size if layout.is_pipeline else None,
            num_microbatches=None,
            # Rows padded to the longest of a batch change shape from pass to pass.
            enable_metadata_cache=self.settings.data.padding_mode == "max_length",
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=self.max_norm,
            cpu_offload=layout.zero_cpu_offload,
            # A pipeline reduces after its last backward pass, and nothing waits for another stream.
            overlap_communication=self.on_gpu and not layout.is_pipeline,
        )
        if layout.is_pipeline:
            allow_empty_groups()
        if layout.mixed_precision == "fp32":
            allow_fp32(plugin)
        return plugin

    def start(self) -> None:
        super().start()
        plugin = self.booster_plugin
        # numpy's integer, which no torch generator takes for a seed.
        self.dp_rank = int(plugin.pg_mesh.coordinate(plugin.dp_axis))
        if self.layout.tp > 1:
            self.tensor_group = plugin.tp_group

    @property
    def ulysses_group(self) -> Any:
        return self.booster_plugin.sp_group if self.layout.uses_ulysses else None

    def pipeline_arguments(self) -> dict[str, Any] | None:
        if not self.layout.is_pipeline:
            return None
        stages = self.booster_plugin.stage_manager
        layers = stages.distribute_layers(self.causal_lm.config.num_hidden_layers)
        return {
            "stage_manager": stages,
            "stage_index": stages.get_stage_index(layers),
            "shard_config": self.booster_plugin.shard_config,
        }

    def after_boost(self) -> None:
        if self.slices_optimizer:
            take_ddp_off(self.model)
        if self.layout.splits_norms:
            sum_partial_gradients_once(self.causal_lm, self.booster_plugin.tp_group)
        settle_gradient_buckets(self)

    # ------------------------------------------------------------------ a step

    @property
    def can_skip_sync(self) -> bool:
        return self.layout.zero_stage < 2

    def train_pass(self, batch: Batch, factor: float, phase: Phase) -> torch.Tensor:
        if not self.layout.is_pipeline:
            return super().train_pass(batch, factor, phase)
        with phase("forward and backward"):
            return self._pipeline_pass(batch, factor)

    def evaluate_pass(self, batch: Batch) -> torch.Tensor:
        if not self.layout.is_pipeline:
            return super().evaluate_pass(batch)
        self.model.eval()
        # Without `no_sync` the plugin sums gradients of tied embeddings over their stages: there are none.
        with torch.no_grad(), self.booster.no_sync(self.model, self.optimizer):
            return self._pipeline_pass(batch, 1.0)

    def _pipeline_pass(self, batch: Batch, factor: float) -> torch.Tensor:
        num_microbatches = batch["input_ids"].size(0) // self.layout.microbatch_size

        def criterion(outputs: dict[str, torch.Tensor], microbatch: Any) -> torch.Tensor:
            # The schedule divides by the number of microbatches.
            return outputs["loss_sum"] * (factor * num_microbatches)

        result = self.booster.execute_pipeline(
            iter([batch]), self.model, criterion, self.optimizer, return_loss=True
        )
        if result["loss"] is None:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return result["loss"].float() / factor

    # ------------------------------------------------------------------ state in a checkpoint

    @property
    def slices_optimizer(self) -> bool:
        return self.layout.zero_stage > 0

    def shard_coordinates(self) -> ShardCoordinates:
        plugin = self.booster_plugin
        mesh = plugin.pg_mesh
        return self._coordinates_in(
            plugin.mixed_dp_group,
            tensor_rank=mesh.coordinate(plugin.tp_axis),
            pipeline_rank=mesh.coordinate(plugin.pp_axis),
        )

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if self.slices_optimizer:
            return zero_master(self.optimizer, parameter)
        if hasattr(self.optimizer, "working_to_master_map"):  # half precision without ZeRO
            return self.optimizer.working_to_master_map.get(parameter)
        return parameter
