"""Gemini accepts colossalai's own Adams alone: they need a compiler, and one of them does not clip.

Broken in: colossalai 0.5.0. `GeminiOptimizer` compares the optimizer's type with FusedAdam, CPUAdam and
HybridAdam, whose kernels nvcc builds at first use; there is none for a machine without a GPU. HybridAdam
ignores the divisor of clipping for bf16 gradients in the host's memory.
Shows as: an assertion ("You should use an optimizer in the available list") with torch's AdamW, "No usable
kernel found" with HybridAdam on a CPU, and `gemini_auto` in bf16 that never clips.
Cure: torch's fused AdamW, on CPU and CUDA tensors alike, with the divisor that Gemini passes on; its type is
added to the list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adamw import adamw


class DividingAdamW(torch.optim.AdamW):
    """torch's fused AdamW for fp32 masters with gradients of any dtype, which a step may divide first."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, div_scale: float = -1) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: not supported.
            div_scale: gradients are divided by it (loss scale and clipping in one); -1 for neither.
        """
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, div_scale)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], div_scale: float) -> None:
        # One parameter at a time: the fp32 gradient of no more than one exists.
        gradient = parameter.grad.to(torch.float32, copy=True)
        if div_scale > 0:
            gradient.div_(div_scale)
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter.data)
        beta1, beta2 = group["betas"]
        adamw(
            [parameter.data],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def let_gemini_take_torch_adam() -> None:
    """Adds `DividingAdamW` to what `GeminiOptimizer` accepts; may be called often."""
    from colossalai.zero.gemini import gemini_optimizer

    gemini_optimizer._AVAIL_OPTIM_LIST.add(DividingAdamW)
