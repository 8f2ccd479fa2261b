"""`eval()` and `train()` pass over the model itself with Gemini: they reach the modules inside it only.

Broken in: colossalai 0.5.0, `GeminiDDP.named_children`, which returns the children of what it wraps.
Shows as: `training` of the wrapped model stays as it was, so that an evaluation with NEFTune has noise.
Cure: set the mode of the wrapped model, which passes it on.
"""

from __future__ import annotations


def set_mode_of_wrapped_model() -> None:
    """Replaces the method behind both; may be called often."""
    from colossalai.zero.gemini import GeminiDDP

    def train(self: GeminiDDP, mode: bool = True) -> GeminiDDP:
        self.training = mode
        self.module.train(mode)
        return self

    GeminiDDP.train = train
