"""The 3d plugin refuses ZeRO in fp32, though its optimizer can do it.

Broken in: colossalai 0.5.0: HybridParallelPlugin compares the name of the precision; nothing else reads it.
Shows as: an assertion, "Please set precision to 'fp16' or 'bf16' when using ZeRO", while boosting.
Cure: another name for the same precision.
"""

from __future__ import annotations

from typing import Any


def allow_fp32(plugin: Any) -> None:
    """Lets a HybridParallelPlugin that was made with `precision="fp32"` boost with any ZeRO stage."""
    plugin.precision = "float32"
