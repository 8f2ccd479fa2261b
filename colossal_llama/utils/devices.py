"""What devices can compute: the vendors' peaks by name. The only table of its kind."""

from __future__ import annotations

TERA = 1e12


def _peaks(bf16: float | None, fp16: float | None, fp32: float | None) -> dict[str, float]:
    figures = {"bf16": bf16, "fp16": fp16, "fp32": fp32}
    return {precision: peak * TERA for precision, peak in figures.items() if peak is not None}


_A100 = _peaks(312, 312, 19.5)
_H100_SXM = _peaks(989.4, 989.4, 66.9)
_H100_PCIE = _peaks(756, 756, 51.2)
_H100_NVL = _peaks(835.5, 835.5, 60)
_V100_SXM2 = _peaks(None, 125, 15.7)
_V100_PCIE = _peaks(None, 112, 14)

# Dense figures (no sparsity) of NVIDIA's data sheets, by the driver's name for the device. fp16 and bf16: on
# tensor cores accumulating in fp32; fp32: without TF32, which torch leaves off for matrix products.
PEAK_FLOPS: dict[str, dict[str, float]] = {
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


def peak_flops(device_name: str, precision: str) -> float | None:
    """The vendor's dense peak in FLOP/s for the exact name of a device; None when it is not known.

    Args:
        precision: bf16, fp16 or fp32.
    """
    return PEAK_FLOPS.get(device_name.removeprefix("NVIDIA "), {}).get(precision)


def known_device(text: str) -> str:
    """A converter for flags: the name of a device in the table, with NVIDIA before it or without."""
    name = text.strip().removeprefix("NVIDIA ")
    found = [known for known in PEAK_FLOPS if known.lower() == name.lower()]
    if found:
        return found[0]
    similar = [known for known in PEAK_FLOPS if name.lower() in known.lower()] if name else []
    raise ValueError(f"unknown device; choose from {', '.join(similar or PEAK_FLOPS)}")
