"""FLOPs, peaks and the benchmark's table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from colossal_llama.training.reporting import throughput
from colossal_llama.training.reporting.throughput import FORMULA, ThroughputMeter
from colossal_llama.utils import devices
from colossal_llama.utils.llama_size import flops_per_token

CONFIG = LlamaConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)


class Clock:
    """Stands still until it is told to move on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(throughput, "_now", lambda: self.now)

    def run(self, meter: ThroughputMeter, phase: str, seconds: float) -> None:
        with meter.phase(phase):
            self.now += seconds


def measured(monkeypatch: pytest.MonkeyPatch) -> ThroughputMeter:
    """One slow warm-up step, then steps of 1, 2 and 3 seconds."""
    clock = Clock(monkeypatch)
    meter = ThroughputMeter(warmup_steps=1)
    for seconds in (50.0, 1.0, 2.0, 3.0):
        clock.run(meter, "data", 0.1 * seconds)
        clock.run(meter, "forward and backward", 0.5 * seconds)
        clock.run(meter, "optimizer", 0.2 * seconds)
        clock.now += 0.2 * seconds
        meter.end_step(tokens=1000, document_lengths_sum=500, document_lengths_square_sum=50_000)
        # Outside of phases, before the next step begins: still that step's time.
        assert meter.phases.keys() <= {"data", "forward and backward", "optimizer", "other"}
    return meter


def test_steps_that_compiled_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = measured(monkeypatch)
    clock = Clock(monkeypatch)
    clock.now = 1000.0
    clock.run(meter, "data", 0.1)
    meter.end_step(1000, 500, 50_000, has_compiled=True)
    assert meter.tokens == 3000
    assert len(meter.durations) == len(meter.phases["data"]) == 3
    report = meter.report(CONFIG, torch.bfloat16, 1, "cpu", 0)
    assert "3 steps after 1 of warm-up and 1 that compiled" in report


def test_warm_up_is_left_out_and_times_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = measured(monkeypatch)
    assert meter.durations == pytest.approx([1, 2, 3])
    assert meter.tokens == 3000
    assert meter.length_sums.tolist() == [1500, 150_000]
    assert meter.phases["forward and backward"] == pytest.approx([0.5, 1, 1.5])
    assert meter.phases["other"] == pytest.approx([0.2, 0.4, 0.6])
    assert sum(map(sum, meter.phases.values())) == pytest.approx(6)


def test_a_phase_entered_twice_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = ThroughputMeter(warmup_steps=0)
    clock.run(meter, "data", 1.0)
    clock.run(meter, "data", 2.0)
    meter.end_step(1, 1, 1)
    assert meter.phases["data"] == [3.0]


def lines_by_name(report: str) -> dict[str, str]:
    return {
        line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in report.splitlines() if "  " in line
    }


def test_report_of_a_known_device(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = measured(monkeypatch)
    report = meter.report(CONFIG, torch.bfloat16, 4, "NVIDIA H200", 3 * 1024**3)
    values = lines_by_name(report)
    assert values["speed"] == "3 steps after 1 of warm-up"
    assert values["tokens/s"] == "500"
    assert values["tokens/s per device"] == "125"
    assert values["step time, median"] == "2.0000 s"
    low, high = np.percentile([1, 2, 3], [10, 90])
    assert values["step time, 10 % to 90 %"] == f"{low:.4f} s to {high:.4f} s"
    assert values["peak memory"] == "3.00 GiB"
    assert values["forward and backward"].split() == ["1.0000", "50.0%"]
    assert values["other"].split() == ["0.4000", "20.0%"]
    assert "989.4 TFLOP/s (NVIDIA H200, bfloat16, dense)" in values["MFU"]
    assert report.endswith(FORMULA)


def test_mfu_is_the_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = measured(monkeypatch)
    wanted = 500 / 4 * flops_per_token(CONFIG, 1500, 150_000)
    monkeypatch.setitem(devices.PEAK_FLOPS, "toy", {"fp32": wanted * 4})
    report = meter.report(CONFIG, torch.float32, 4, "toy", 0)
    assert lines_by_name(report)["MFU"].startswith("25.0% of ")
    assert math.isclose(float(lines_by_name(report)["TFLOP/s per device"]), wanted / 1e12, rel_tol=1e-3)


def test_an_unknown_device_gets_no_mfu_but_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    report = measured(monkeypatch).report(CONFIG, torch.float32, 1, "cpu", 1)
    values = lines_by_name(report)
    assert values["MFU"] == "not given: no vendor's peak is known for cpu in float32"
    assert values["tokens/s"] == "500"
    assert "TFLOP/s per device" in values


def test_only_warm_up_steps_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = ThroughputMeter(warmup_steps=2)
    clock.run(meter, "data", 1.0)
    meter.end_step(1, 1, 1)
    report = meter.report(CONFIG, torch.float32, 1, "cpu", 0)
    assert "1 steps ran and 2 are warm-up" in report
    assert "--num_samples" in report


def test_the_real_clock_runs() -> None:
    meter = ThroughputMeter(warmup_steps=0)
    with meter.phase("data"):
        sum(range(1000))
    meter.end_step(10, 10, 100)
    assert 0 < meter.durations[0] < 10
    assert 0 < meter.phases["data"][0] <= meter.durations[0]
