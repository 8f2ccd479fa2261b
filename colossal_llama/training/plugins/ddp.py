"""`ddp`: the whole model on every process, gradients averaged (torch's DistributedDataParallel)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colossal_llama.training.memory import FP32_BYTES, MOMENT_BYTES, ParameterCounts
from colossal_llama.training.plugins.base import INITIAL_LOSS_SCALE, Plugin
from colossal_llama.training.plugins.groups import set_learning_rates
from colossal_llama.upstream.ddp_bucket_order import settle_gradient_buckets


class DdpPlugin(Plugin):
    """colossalai's plugin knows no mixed precision and no clipping: fp32 weights under autocast, a scaler for
    fp16 and clipping are added here.
    """

    name = "ddp"
    autocasts = True
    compiles = True

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        # fp32 weights are their own masters; autocast keeps half-precision copies for the backward pass.
        copies = self.value_bytes * counts.linear if self.value_bytes < FP32_BYTES else 0
        return {
            "weights": FP32_BYTES * counts.total + copies,
            "gradients": FP32_BYTES * counts.trainable,
            "moments": MOMENT_BYTES * counts.trainable,
            "communication": FP32_BYTES * counts.trainable,
        }

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import TorchDDPPlugin

        return TorchDDPPlugin()

    def start(self) -> None:
        super().start()
        self.scaler = None
        if self.compute_dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self.device.type, init_scale=INITIAL_LOSS_SCALE)

    def after_boost(self) -> None:
        settle_gradient_buckets(self)

    @property
    def can_skip_sync(self) -> bool:
        return True

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def optimizer_step(
        self, learning_rate: float, embeddings_rate: float | None = None
    ) -> tuple[float, bool]:
        optimizer = self.optimizer.optim
        set_learning_rates(optimizer, learning_rate, embeddings_rate)
        skipped = False
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

    def loss_scale_state(self) -> dict[str, float]:
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_loss_scale_state(self, state: dict[str, float]) -> None:
        if state and self.scaler is not None:
            # Of another plugin's state only the scale is known; the counters start again.
            self.scaler.load_state_dict({**self.scaler.state_dict(), **state})
