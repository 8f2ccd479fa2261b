"""`gemini` and `gemini_auto`: everything in chunks, spread over all processes and the host (ZeRO stage 3)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from colossal_llama.training.memory import FP32_BYTES, MOMENT_BYTES, ParameterCounts
from colossal_llama.training.plugins.base import INITIAL_LOSS_SCALE, Plugin, has_apex_norm

if TYPE_CHECKING:
    from transformers import LlamaConfig

# colossalai's default: elements of the largest chunk that it searches.
GEMINI_CHUNK_ELEMENTS = 64 * 1024**2
WEIGHTS_PER_FILE_MIB = 5 * 1024


class GeminiPlugin(Plugin):
    """Chunks stay on the device."""

    name = "gemini"
    placement_policy: ClassVar[str] = "static"
    needs_whole_logits = True
    saves_by_parameter = False
    places_parameters_itself = True

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

    def model_conflicts(self, config: LlamaConfig) -> list[str]:
        problems = super().model_conflicts(config)
        # A dry run may plan for GPUs on a machine without one.
        if not torch.cuda.is_available() and not self.settings.output.dry_run:
            problems.insert(
                0,
                f"--plugin {self.name}: runs on GPUs only, and none is visible; "
                "use zero2, ddp or 3d on a CPU",
            )
        return problems

    def doubts(self) -> list[str]:
        if torch.cuda.is_available():
            return []
        return [f"--plugin {self.name}: runs on GPUs only, and this machine shows none"]

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        # Everything is spread over all processes in chunks. A gradient takes the place of its weight;
        # accumulation gives it a chunk of its own. Two whole chunks are gathered at a time.
        shard = -(-counts.total // self.layout.world_size)
        chunk = min(counts.total, max(GEMINI_CHUNK_ELEMENTS, counts.largest))
        return {
            "weights": self.value_bytes * shard,
            "gradients": self.value_bytes * shard if self.layout.accumulation_steps > 1 else 0,
            "master_weights": FP32_BYTES * shard,
            "moments": MOMENT_BYTES * shard,
            "communication": 2 * self.value_bytes * chunk,
        }

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import GeminiPlugin as ColossalaiGeminiPlugin

        return ColossalaiGeminiPlugin(
            precision=self.layout.mixed_precision,
            placement_policy=self.placement_policy,
            enable_gradient_accumulation=self.layout.accumulation_steps > 1,
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=self.max_norm,
            enable_flash_attention=False,
            enable_fused_normalization=self.on_gpu and has_apex_norm(),
        )

    def save_state(self, directory: Path) -> None:
        self.booster.save_optimizer(self.optimizer, str(directory), shard=True)

    def load_state(self, directory: Path) -> None:
        self.booster.load_optimizer(self.optimizer, str(directory))

    def save_weights(self, directory: Path) -> None:
        self.booster.save_model(
            self.model, str(directory), shard=True, size_per_shard=WEIGHTS_PER_FILE_MIB, use_safetensors=True
        )


class GeminiAutoPlugin(GeminiPlugin):
    """Chunks move to the host's memory when the device is full."""

    name = "gemini_auto"
    placement_policy = "auto"

    def memory_notes(self) -> list[str]:
        return ["gemini_auto moves to the CPU what does not fit."]
