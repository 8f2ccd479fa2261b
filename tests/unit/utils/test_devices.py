"""Peaks of devices by their exact names."""

from __future__ import annotations

import pytest

from colossal_llama.utils.devices import PEAK_FLOPS, known_device, peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("A100-SXM4-40GB", "fp16", 312),
        ("NVIDIA A800-SXM4-80GB", "bf16", 312),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H800", "fp16", 989.4),
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
    ],
)
def test_known_peaks(name: str, precision: str, teraflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("NVIDIA A100", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA H200", "fp64"),
    ],
)
def test_no_peak_is_guessed(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_names_on_the_command_line() -> None:
    for name in PEAK_FLOPS:
        assert known_device(name) == known_device(f"NVIDIA {name}") == known_device(name.lower()) == name
    with pytest.raises(ValueError, match=r"unknown device; choose from H100 80GB HBM3, H100 PCIe, H100 NVL$"):
        known_device("H100")
    with pytest.raises(ValueError, match=r"choose from A100-SXM4-40GB, .*V100S"):
        known_device("TPU")
