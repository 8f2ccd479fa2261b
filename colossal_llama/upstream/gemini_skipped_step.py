"""One fp16 overflow ends training with Gemini, silently, where gradients are accumulated.

Broken in: colossalai 0.5.0, `GeminiOptimizer.step`: when it leaves out a step it returns with
`accumulating_grads` still set.
Shows as: the next gradients are added to those that overflowed, so every later step is left out as well, and
the loss scale is halved each time.
Cure: clear the flag after every step, done or left out.
"""

from __future__ import annotations

from typing import Any


def forget_gradients_of_skipped_steps() -> None:
    """Replaces the method; may be called often."""
    from colossalai.zero.gemini import GeminiOptimizer

    if getattr(GeminiOptimizer, "_forgets_gradients", False):
        return
    original_step = GeminiOptimizer.step

    def step(self: GeminiOptimizer, *args: Any, **kwargs: Any) -> Any:
        result = original_step(self, *args, **kwargs)
        self.chunk_manager.accumulating_grads = False
        return result

    GeminiOptimizer.step = step
    GeminiOptimizer._forgets_gradients = True
