"""`gemini` and `gemini_auto`: everything in chunks, spread over all processes and the host (ZeRO stage 3).

A parameter is a range of a chunk, and each process holds an equal shard of every chunk. So a process holds a
slice of some parameters, and nothing of others:

    chunk     |  p  p  p  p  p  q  q  q |  q  q  r  r  r  r  -  - |      "-" is padding
    process   |<------- rank 0 -------->|<------- rank 1 -------->|
    rank 1 holds: q from offset 3, two elements; r from offset 0, four; nothing of p
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from colossal_llama.training.memory import (
    FP32_BYTES,
    MOMENT_BYTES,
    ParameterCounts,
    pinned_bytes,
    trained_tensors,
)
from colossal_llama.training.plugins.base import INITIAL_LOSS_SCALE, Batch, Plugin
from colossal_llama.training.plugins.gemini_chunks import (
    choose_chunk_size,
    deal_tensors,
    largest_neighbours,
)
from colossal_llama.upstream.gemini_adam import DividingAdamW, let_gemini_take_torch_adam
from colossal_llama.upstream.gemini_memory_samples import count_memory_samples_anew
from colossal_llama.upstream.gemini_on_cpu import let_gemini_run_on_cpus, pretend_device_memory
from colossal_llama.upstream.gemini_skipped_step import forget_gradients_of_skipped_steps
from colossal_llama.upstream.gemini_training_mode import set_mode_of_wrapped_model

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.llama.embedding_noise import EmbeddingNoise


class GeminiPlugin(Plugin):
    """Chunks stay on the device.

    Attributes:
        placement_policy: colossalai's name of where chunks are.
        pins_memory: chunks on the host are in pinned memory, on machines with a GPU.
    """

    name = "gemini"
    placement_policy: ClassVar[str] = "static"
    needs_whole_logits = True
    spreads_weights = True
    pins_memory: ClassVar[bool] = False

    # ------------------------------------------------------------------ before a run

    def conflicts(self) -> list[str]:
        problems = super().conflicts()
        if self.settings.layout.mixed_precision == "fp32":
            problems.append(
                f"--mixed_precision fp32: {self.name} knows fp16 and bf16 only; use zero2, ddp or 3d"
            )
        rank = self.settings.adaptation.lora_rank
        if rank:
            problems.append(f"--lora_rank {rank}: {self.name} can't train LoRA; use zero2 or ddp")
        return problems

    def count_held_parameters(self, config: LlamaConfig, stage: int = 0) -> ParameterCounts:
        counts = super().count_held_parameters(config, stage)
        return replace(counts, tensors=trained_tensors(config, self.settings.adaptation))

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        # What trains is spread in chunks, what is frozen is whole everywhere. A gradient takes the place of
        # its weight; accumulation gives it a chunk of its own.
        value, world_size = self.value_bytes, self.layout.world_size
        chunks = self._deal(counts.tensors)
        shard = sum(chunks) // world_size
        accumulates = self.layout.accumulation_steps > 1
        return {
            "weights": value * (shard + counts.total - counts.trainable),
            "gradients": value * shard if accumulates else 0,
            "master_weights": FP32_BYTES * shard,
            "moments": MOMENT_BYTES * -(-counts.trainable // world_size),
            # The chunks of an operation, whole, and that of a gradient.
            "communication": value * (largest_neighbours(chunks) + accumulates * max(chunks)),
            # The optimizer's, of one slice at a time.
            "step_copies": FP32_BYTES * max(chunks) // world_size,
        }

    def _deal(self, sizes: tuple[int, ...]) -> list[int]:
        world_size = self.layout.world_size
        return deal_tensors(sizes, choose_chunk_size(sizes, world_size), world_size)

    # ------------------------------------------------------------------ boosting

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import GeminiPlugin as ColossalaiGeminiPlugin

        forget_gradients_of_skipped_steps()
        set_mode_of_wrapped_model()
        let_gemini_take_torch_adam()
        if not self.on_gpu:
            let_gemini_run_on_cpus()
        return ColossalaiGeminiPlugin(
            precision=self.layout.mixed_precision,
            placement_policy=self.placement_policy,
            enable_gradient_accumulation=self.layout.accumulation_steps > 1,
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=self.max_norm,
            enable_flash_attention=False,
            pin_memory=self.pins_memory and self.on_gpu,
            # By reading, its stream takes gradients that the other may still write.
            enable_async_reduce=False,
        )

    def make_optimizer(self, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return DividingAdamW(parameters, fused=True, **self.adam_settings)

    def boost(self, model: nn.Module, causal_lm: nn.Module, noise: EmbeddingNoise | None) -> None:
        sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        world_size = self.layout.world_size
        chunk_size = choose_chunk_size(sizes, world_size)
        self.booster_plugin.gemini_config["chunk_config_dict"] = {
            world_size: {"chunk_size": chunk_size, "keep_gathered": False}
        }
        super().boost(model, causal_lm, noise)

    def _find_masters(self) -> None:
        """Looks up which slices this process holds: parameter -> (what the optimizer updates, offset)."""
        optimizer = self.optimizer
        self._masters: dict[nn.Parameter, tuple[nn.Parameter, int]] = {}
        for number, updated in optimizer.id_to_fake_params.items():
            _, offset, _ = optimizer.get_offsets(number)
            self._masters[optimizer.id_to_real_params[number]] = (updated, offset)

    def check_weights(self) -> None:
        from colossal_llama.training.llama.weight_checks import check_sum

        self._find_masters()
        names = list(self.parameter_names.values())
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        for row, parameter in enumerate(self.parameter_names):
            held = self.master_of(parameter)
            if not parameter.requires_grad and dist.get_rank() == 0:  # whole on every process
                held = parameter.data
            if held is not None:
                values = held.detach()
                sums[row, 0] = values.sum(dtype=torch.float64)
                sums[row, 1] = torch.linalg.vector_norm(values, ord=1, dtype=torch.float64)
        dist.all_reduce(sums)
        for name, (total, magnitude) in zip(names, sums.tolist(), strict=True):
            check_sum(name, total, magnitude, self.loaded_sums[name], self.parameter_dtype)

    # ------------------------------------------------------------------ state in a checkpoint

    @property
    def slices_optimizer(self) -> bool:
        return True

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        if parameter not in self._masters:
            return None
        # Between steps colossalai leaves it empty; its place in the master chunk stays.
        updated, _ = self._masters[parameter]
        begin, end = self.optimizer.param_to_range[updated]
        updated.data = self.optimizer.param_to_chunk16[updated].paired_chunk.payload[begin:end]
        return updated

    def slice_offset(self, parameter: nn.Parameter) -> int | None:
        return self._masters[parameter][1]

    def gather_weights(self, parameters: Iterable[nn.Parameter]) -> Iterator[torch.Tensor]:
        """Of the masters: the half-precision weights may be out of date, or overwritten by gradients."""
        gathered = whole = None
        for parameter in parameters:
            if not parameter.requires_grad:  # whole on every process
                yield parameter.data.as_subclass(torch.Tensor)
                continue
            chunk = self.model.chunk_manager.get_chunk(parameter)
            if gathered is not chunk:
                shard = chunk.paired_chunk.payload.to(device=self.device, dtype=self.parameter_dtype)
                gathered, whole = chunk, shard.new_empty(chunk.chunk_size)
                dist.all_gather_into_tensor(whole, shard, group=chunk.torch_pg)
            place = chunk.tensors_info[parameter]
            yield whole[place.offset : place.end].view(parameter.shape)


class GeminiAutoPlugin(GeminiPlugin):
    """The optimizer's state is in the host's memory, and chunks move there when the device is full."""

    name = "gemini_auto"
    placement_policy = "auto"
    pins_memory = True

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        states = super().estimate_states(counts)
        # Every chunk has its place in the host's memory, whether it is used or not: of weights and masters,
        # and of gradients where they are accumulated.
        shards = [size // self.layout.world_size for size in self._deal(counts.tensors)]
        held = [self.value_bytes, FP32_BYTES] + [self.value_bytes] * (self.layout.accumulation_steps > 1)
        pinned = pinned_bytes(size * shard for size in held for shard in shards)
        frozen = self.value_bytes * (counts.total - counts.trainable)
        # Gathered chunks are all that has to be on the device.
        on_host = pinned + states["moments"] + states["step_copies"]
        return {"weights": frozen + states["communication"], "host": on_host}

    def memory_notes(self) -> list[str]:
        return [
            "gemini_auto: the least that it needs; weights stay on the device while there is room.",
            "Its blocks of CPU memory are pinned, and rounded up to powers of two.",
        ]

    def make_booster_plugin(self) -> Any:
        count_memory_samples_anew()
        if not self.on_gpu:
            pretend_device_memory()
        return super().make_booster_plugin()

    def evaluate_pass(self, batch: Batch) -> torch.Tensor:
        if self.model.gemini_manager.is_warmup():
            self._learn_order(batch)
        return super().evaluate_pass(batch)

    def _learn_order(self, batch: Batch) -> None:
        """A backward pass that is thrown away: all that comes later is as if it had not been.

        The placement learns the order of the chunks in the first one, and refuses to evaluate before.
        """
        noise, self.causal_lm.embedding_noise = self.causal_lm.embedding_noise, None
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.on_gpu else []):
            self.train_pass(batch, 0.0, contextlib.nullcontext)
        self.causal_lm.embedding_noise = noise
        # What colossalai does when it leaves out a step.
        optimizer, chunks = self.optimizer, self.model.chunk_manager
        optimizer._clear_global_norm()
        optimizer.zero_grad()
        chunks.accumulating_grads = False
        if chunks.reuse_fp16_chunk:  # the gradients lie over the weights
            optimizer._update_fp16_params()
