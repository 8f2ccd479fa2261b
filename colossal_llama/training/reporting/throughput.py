"""Speed of training steps: tokens a second, model FLOP/s and their share of what the device can do (MFU)."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from colossal_llama.model.dtypes import flag_name
from colossal_llama.utils.console import format_table
from colossal_llama.utils.devices import TERA, peak_flops
from colossal_llama.utils.llama_size import flops_per_token

if TYPE_CHECKING:
    from transformers import LlamaConfig

FORMULA = (
    "FLOPs per token = 6 (N - N_input_embedding) + 6 L d (sum of len^2 / sum of len) over the documents' "
    "lengths: causal attention counted once, recomputation not counted"
)


class ThroughputMeter:
    """Collects the time of each optimizer step and of its phases; the first `warmup_steps` are left out, and
    those that compiled.

    A step lasts from the end of the one before (the first: from its first phase) to `end_step`; what no phase
    covers is reported as "other".
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.steps_seen = 0
        self.steps_compiled = 0
        self.durations: list[float] = []
        self.tokens = 0
        self.length_sums = np.zeros(2)
        self.phases: dict[str, list[float]] = defaultdict(list)
        self._current: dict[str, float] = defaultdict(float)
        self._started: float | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a block; on CUDA it waits for the device, so that a phase is charged what it asked for."""
        started = _now()
        if self._started is None:
            self._started = started
        yield
        self._current[name] += _now() - started

    def end_step(
        self,
        tokens: int,
        document_lengths_sum: float,
        document_lengths_square_sum: float,
        has_compiled: bool = False,
    ) -> None:
        """Ends an optimizer step.

        Args:
            tokens: of all processes together, padding not counted.
            document_lengths_sum, document_lengths_square_sum: over documents, of this process or of all.
            has_compiled: graphs were made in it.
        """
        assert self._started is not None, "a step has at least one phase"
        now = _now()
        self.steps_seen += 1
        if self.steps_seen > self.warmup_steps and has_compiled:
            self.steps_compiled += 1
        elif self.steps_seen > self.warmup_steps:
            duration = now - self._started
            self.durations.append(duration)
            self.tokens += tokens
            self.length_sums += (document_lengths_sum, document_lengths_square_sum)
            for name, seconds in self._current.items():
                self.phases[name].append(seconds)
            self.phases["other"].append(max(0.0, duration - sum(self._current.values())))
        self._current.clear()
        self._started = now

    def report(
        self,
        config: LlamaConfig,
        dtype: torch.dtype,
        world_size: int,
        device_name: str,
        peak_memory_bytes: int,
    ) -> str:
        """The figures as tables, and the formula behind them."""
        compiled = f" and {self.steps_compiled} that compiled" if self.steps_compiled else ""
        if not self.durations:
            return (
                f"No speed to report: {self.steps_seen} steps ran and {self.warmup_steps}{compiled} are "
                "warm-up; raise --num_samples, --num_epochs or --max_steps"
            )
        durations = np.array(self.durations)
        tokens_per_second = self.tokens / durations.sum()
        flops = tokens_per_second * flops_per_token(config, *self.length_sums) / world_size
        peak = peak_flops(device_name, flag_name(dtype) or "")
        dtype_name = str(dtype).removeprefix("torch.")
        if peak is None:
            mfu = f"not given: no vendor's peak is known for {device_name} in {dtype_name}"
        else:
            mfu = f"{flops / peak:.1%} of {peak / TERA:,.1f} TFLOP/s ({device_name}, {dtype_name}, dense)"
        p10, median, p90 = np.percentile(durations, [10, 50, 90])
        speed = format_table(
            ("speed", f"{len(durations)} steps after {self.warmup_steps} of warm-up{compiled}"),
            [
                ("tokens/s", f"{tokens_per_second:,.0f}"),
                ("tokens/s per device", f"{tokens_per_second / world_size:,.0f}"),
                ("step time, median", f"{median:.4f} s"),
                ("step time, 10 % to 90 %", f"{p10:.4f} s to {p90:.4f} s"),
                ("TFLOP/s per device", f"{flops / TERA:,.4g}"),
                ("MFU", mfu),
                ("peak memory", f"{peak_memory_bytes / 1024**3:,.2f} GiB"),
            ],
        )
        phases = format_table(
            ("phase", "mean s", "share"),
            [
                (name, f"{sum(seconds) / len(durations):.4f}", f"{sum(seconds) / durations.sum():.1%}")
                for name, seconds in self.phases.items()
            ],
        )
        return "\n\n".join([speed, phases, FORMULA])


def _now() -> float:
    """Seconds; on CUDA after all work handed to the device so far."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
