"""The learning rate of all arms, chosen by a short look at the first one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run, a step each; a run that was continued may have a step twice: the last counts."""
    text = (run_dir / "logs" / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return list({record["step"]: record for record in records}.values())


def read_looks(work_dir: Path, rates: Sequence[float]) -> list[dict[str, float]]:
    """For each rate: bits per byte of validation text at the start and the end of its look."""
    looks = []
    for rate in rates:
        records = read_metrics(work_dir / "runs" / f"look-{rate:g}")
        evaluated = [record for record in records if "eval_bits_per_byte" in record]
        row: dict[str, float] = {"rate": rate}
        for language in ("zh", "en"):
            key = f"eval_bits_per_byte/{language}"
            row |= {f"{language}_start": evaluated[0][key], f"{language}_end": evaluated[-1][key]}
        looks.append(row)
    return looks


def choose_rate(work_dir: Path, rates: Sequence[float]) -> float:
    """The rate after which both languages together have the fewest bits per byte."""
    looks = read_looks(work_dir, rates)

    def total(look: dict[str, float]) -> float:
        bits = look["zh_end"] + look["en_end"]
        return bits if math.isfinite(bits) else math.inf

    return min(looks, key=total)["rate"]
