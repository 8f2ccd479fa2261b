"""fp16 gradients are divided by a loss scale that may have grown since they were computed.

Broken in: colossalai 0.5.0, the optimizers of low-level ZeRO, of the 3d plugin and of Gemini.
`should_skip_step` looks for an overflow and updates the scale before the gradients are unscaled.
Shows as: every growth interval (1,000 steps) one step is half as long as it should be.
Cure: remember the scale that the backward pass used, and unscale by that.
"""

from __future__ import annotations

from typing import Any

# Of low-level ZeRO, of the 3d plugin without ZeRO, and of Gemini.
_SCALING_ATTRIBUTES = ("mixed_precision_mixin", "mixed_precision", "mix_precision_mixin")


class BackwardLossScale:
    """The loss scaler of one of colossalai's optimizers, unscaling by the scale of the backward pass.

    Attributes:
        used: the scale that this step's gradients have been multiplied with.
    """

    def __init__(self, scaling: Any) -> None:
        self._scaling = scaling
        self.used = 1.0
        check_and_update = scaling.should_skip_step

        def remember_then_check() -> bool:
            self.used = scaling.loss_scale
            return check_and_update()

        def used_scale() -> float:
            from colossalai.amp.naive_amp.mixed_precision_mixin.fp16 import OptimState

            scaling.optim_state = OptimState.UNSCALED
            return self.used

        scaling.should_skip_step = remember_then_check
        scaling.get_grad_div_scale = used_scale

    @classmethod
    def find(cls, optimizer: Any) -> BackwardLossScale | None:
        """The scaler of an optimizer; None where nothing is scaled."""
        for name in _SCALING_ATTRIBUTES:
            scaling = getattr(optimizer, name, None)
            if hasattr(scaling, "grad_scaler"):
                return cls(scaling)
        return None

    @property
    def found_overflow(self) -> bool:
        """Whether the last step was skipped."""
        return bool(self._scaling.found_overflow.item() > 0)

    def state(self) -> dict[str, float]:
        """JSON-able, with the counters that the scaler's own `state_dict` leaves out."""
        scaler = self._scaling.grad_scaler
        return {
            "scale": scaler.scale.item(),
            "growth_step": scaler._growth_step,
            "hysteresis_step": scaler._hysteresis_step,
        }

    def load_state(self, state: dict[str, float]) -> None:
        """Of another plugin's state only the scale is known; the counters start again."""
        scaler = self._scaling.grad_scaler
        scaler._scale.fill_(state["scale"])
        scaler._growth_step = int(state.get("growth_step", 0))
        scaler._hysteresis_step = int(state.get("hysteresis_step", 0))
