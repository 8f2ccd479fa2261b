"""`zero2` and `zero2_cpu`: gradients and optimizer state sliced over all processes (low-level ZeRO)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from colossal_llama.training.memory import ParameterCounts, estimate_sliced_states
from colossal_llama.training.plugins.base import INITIAL_LOSS_SCALE, Plugin

# colossalai's default: elements of gradients that are reduced together.
ZERO_BUCKET_ELEMENTS = 12 * 1024**2


def zero_master(optimizer: Any, parameter: nn.Parameter) -> torch.Tensor | None:
    """This process's slice of a parameter's fp32 master, as colossalai's low-level ZeRO keeps it."""
    return optimizer.working_to_master_param.get(id(parameter))


class Zero2Plugin(Plugin):
    """ZeRO stage 2, the optimizer's state on the device."""

    name = "zero2"
    compiles = True
    offloads: ClassVar[bool] = False

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        return estimate_sliced_states(
            self.value_bytes,
            counts,
            self.layout.world_size,
            slices_gradients=True,
            offloads=self.offloads,
            bucket_elements=ZERO_BUCKET_ELEMENTS,
        )

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import LowLevelZeroPlugin

        return LowLevelZeroPlugin(
            stage=2,
            precision=self.layout.mixed_precision,
            initial_scale=INITIAL_LOSS_SCALE,
            max_norm=self.max_norm,
            overlap_communication=self.on_gpu,
            cpu_offload=self.offloads,
        )

    @property
    def slices_optimizer(self) -> bool:
        return True

    def master_of(self, parameter: nn.Parameter) -> torch.Tensor | None:
        return zero_master(self.optimizer, parameter)


class Zero2CpuPlugin(Zero2Plugin):
    """ZeRO stage 2, the optimizer's state in the host's memory."""

    name = "zero2_cpu"
    offloads = True
