"""Speed of training steps: tokens a second, model FLOP/s and their share of what the device can do (MFU)."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from colossal_llama.training.memory import head_size, matrix_parameters
from colossal_llama.utils.console import format_table

if TYPE_CHECKING:
    from transformers import LlamaConfig

FORMULA = (
    "FLOPs per token = 6 (N - N_input_embedding) + 6 L d (sum of len^2 / sum of len) over the documents' "
    "lengths: causal attention counted once, recomputation not counted"
)

_TERA = 1e12
_HALF_AND_FULL = (torch.bfloat16, torch.float16, torch.float32)


def _peaks(bf16: float | None, fp16: float | None, fp32: float | None) -> dict[torch.dtype, float]:
    figures = zip(_HALF_AND_FULL, (bf16, fp16, fp32), strict=True)
    return {dtype: peak * _TERA for dtype, peak in figures if peak is not None}


_A100 = _peaks(312, 312, 19.5)
_H100_SXM = _peaks(989.4, 989.4, 66.9)
_H100_PCIE = _peaks(756, 756, 51.2)
_H100_NVL = _peaks(835.5, 835.5, 60)
_V100_SXM2 = _peaks(None, 125, 15.7)
_V100_PCIE = _peaks(None, 112, 14)

# Dense figures (no sparsity) of NVIDIA's data sheets, by the driver's name for the device. fp16 and bf16: on
# tensor cores accumulating in fp32; fp32: without TF32, which torch leaves off for matrix products.
PEAK_FLOPS: dict[str, dict[torch.dtype, float]] = {
    "A100-SXM4-40GB": _A100,
    "A100-SXM4-80GB": _A100,
    "A100-PCIE-40GB": _A100,
    "A100 80GB PCIe": _A100,
    "A800-SXM4-40GB": _A100,
    "A800-SXM4-80GB": _A100,
    "A800 80GB PCIe": _A100,
    "A30": _peaks(165, 165, 10.3),
    "A40": _peaks(149.7, 149.7, 37.4),
    "A10": _peaks(125, 125, 31.2),
    "L40S": _peaks(362, 362, 91.6),
    "H100 80GB HBM3": _H100_SXM,
    "H100 PCIe": _H100_PCIE,
    "H100 NVL": _H100_NVL,
    "H800": _H100_SXM,
    "H800 PCIe": _H100_PCIE,
    "H200": _H100_SXM,
    "H200 NVL": _H100_NVL,
    "H20": _peaks(148, 148, 44),
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": _peaks(None, 130, 16.4),
}


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The vendor's dense peak in FLOP/s for the exact name of a device; None when it is not known."""
    return PEAK_FLOPS.get(device_name.removeprefix("NVIDIA "), {}).get(dtype)


def flops_per_token(
    config: LlamaConfig, document_lengths_sum: float, document_lengths_square_sum: float
) -> float:
    """Forward and backward pass, for each token: 6 (N - N_input_embedding) + 6 L d (sum len^2 / sum len).

    The input embedding is left out: a look-up multiplies nothing. A tied matrix is the head, and counts. d is
    heads x head size, L the number of layers. After Kaplan et al. 2020 (6 N) and Chowdhery et al. 2022
    (attention: 12 L d len there, of which a causal mask uses half).

    Args:
        document_lengths_sum: of real documents; whole rows where documents are not isolated.
    """
    mean_length = document_lengths_square_sum / document_lengths_sum
    width = config.num_attention_heads * head_size(config)
    return 6 * matrix_parameters(config) + 6 * config.num_hidden_layers * width * mean_length


class ThroughputMeter:
    """Collects the time of each optimizer step and of its phases; the first `warmup_steps` are left out.

    A step lasts from the end of the one before (the first: from its first phase) to `end_step`; what no phase
    covers is reported as "other".
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.steps_seen = 0
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

    def end_step(self, tokens: int, document_lengths_sum: float, document_lengths_square_sum: float) -> None:
        """Ends an optimizer step.

        Args:
            tokens: of all processes together, padding not counted.
            document_lengths_sum, document_lengths_square_sum: over documents, of this process or of all.
        """
        assert self._started is not None, "a step has at least one phase"
        now = _now()
        self.steps_seen += 1
        if self.steps_seen > self.warmup_steps:
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
        if not self.durations:
            return (
                f"No speed to report: {self.steps_seen} steps ran and {self.warmup_steps} are warm-up; "
                "raise --num_samples, --num_epochs or --max_steps"
            )
        durations = np.array(self.durations)
        tokens_per_second = self.tokens / durations.sum()
        flops = tokens_per_second * flops_per_token(config, *self.length_sums) / world_size
        peak = peak_flops(device_name, dtype)
        dtype_name = str(dtype).removeprefix("torch.")
        if peak is None:
            mfu = f"not given: no vendor's peak is known for {device_name} in {dtype_name}"
        else:
            mfu = f"{flops / peak:.1%} of {peak / _TERA:,.1f} TFLOP/s ({device_name}, {dtype_name}, dense)"
        p10, median, p90 = np.percentile(durations, [10, 50, 90])
        speed = format_table(
            ("speed", f"{len(durations)} steps after {self.warmup_steps} of warm-up"),
            [
                ("tokens/s", f"{tokens_per_second:,.0f}"),
                ("tokens/s per device", f"{tokens_per_second / world_size:,.0f}"),
                ("step time, median", f"{median:.4f} s"),
                ("step time, 10 % to 90 %", f"{p10:.4f} s to {p90:.4f} s"),
                ("TFLOP/s per device", f"{flops / _TERA:,.4g}"),
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
