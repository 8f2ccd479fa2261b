# ruff: noqa: E402 - the registry comes before what reads it
"""`train.py` with one plugin more: a class, and a line in the registry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from colossal_llama.training.plugins import PLUGINS

PLUGINS["made_up"] = f"{__name__}:MadeUpPlugin"

import train
from colossal_llama.training.memory import FP32_BYTES, MOMENT_BYTES, ParameterCounts
from colossal_llama.training.plugins.base import Plugin
from colossal_llama.utils.errors import run_command


class MadeUpPlugin(Plugin):
    """Data parallelism in fp32 through the hybrid plugin, without what that can do besides."""

    name = "made_up"

    def conflicts(self) -> list[str]:
        precision = self.layout.mixed_precision
        wrong = [f"--mixed_precision {precision}: made_up knows fp32 only; use fp32"]
        return super().conflicts() + (wrong if precision != "fp32" else [])

    def estimate_states(self, counts: ParameterCounts) -> dict[str, int]:
        weights = FP32_BYTES * counts.total
        return {"weights": weights, "gradients": weights, "moments": MOMENT_BYTES * counts.trainable}

    def make_booster_plugin(self) -> Any:
        from colossalai.booster.plugin import HybridParallelPlugin

        return HybridParallelPlugin(
            tp_size=1, pp_size=1, precision="fp32", zero_stage=0, max_norm=self.max_norm, parallel_output=True
        )


if __name__ == "__main__":
    run_command(train.main, exit_at_once=True)
