"""What the benchmarks have in common: the promises, and how a script hands in what it measured.

A figure is printed; where `BENCHMARK_RECORDS` names a file, it is also appended there as a line
of JSON, from which `write_results.py` makes its table.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.utils.console import log

RECORDS_VARIABLE = "BENCHMARK_RECORDS"


@dataclass(frozen=True)
class Promise:
    """What a figure has to be.

    `limit` gets the quantities that the script hands in with the figure, by name, and returns the bound.
    """

    text: str
    limit: Callable[..., float]
    at_least: bool = False

    def is_met(self, value: float, quantities: dict[str, float]) -> bool:
        bound = self.limit(**quantities)
        return value >= bound if self.at_least else value <= bound


def _at_most(text: str, bound: float) -> Promise:
    return Promise(text, lambda: bound)


def _at_least(text: str, bound: float) -> Promise:
    return Promise(text, lambda: bound, at_least=True)


_PREPARATION_MEMORY = Promise("under 1.5 GB + 0.3 GB a worker", lambda num_workers: 1.5 + 0.3 * num_workers)
_NEAR_LINEAR = Promise(
    "no worse than n log n (with a half more for noise)", lambda n_log_n_growth: 1.5 * n_log_n_growth
)

# The one place for promises, by the key of the figure.
PROMISES = {
    "init_tokenizer.seconds": _at_most("under 5 s", 5.0),
    "init_model.seconds": Promise(
        "at most 2 × copying the bytes + 6 s", lambda copy_seconds: 2 * copy_seconds + 6
    ),
    "init_model.memory": Promise(
        "at most 1.5 × the two matrices + 0.5 GB", lambda matrices_gb: 1.5 * matrices_gb + 0.5
    ),
    "prepare_pretrain.speed": _at_least("at least 0.6 × the bare tokenizer", 0.6),
    "prepare_sft.speed": _at_least("at least 0.4 × the bare tokenizer", 0.4),
    "prepare_pretrain.tuetoken": _at_least("at least 1.2 × the bare tokenizer", 1.2),
    "prepare_sft.tuetoken": _at_least("at least 0.9 × the bare tokenizer", 0.9),
    "prepare_sft.chat_template": _at_least("at least 0.3 × the bare tokenizer", 0.3),
    "prepare.fill": _at_least("at least 99.5 %", 99.5),
    "prepare.memory": _PREPARATION_MEMORY,
    "train_step.ratio": _at_most("at most 1.03 × a bare loop", 1.03),
    "gpu.mfu": _at_least("at least 55 % on one H100 or H200, 1-8 B parameters, bf16", 55.0),
    "scaling.growth": _NEAR_LINEAR,
}


def report(
    title: str,
    value: float | None,
    unit: str,
    *,
    promise: str | None = None,
    samples: Sequence[float] = (),
    note: str = "",
    **quantities: float,
) -> None:
    """Hands in a figure.

    Args:
        title: what was measured, for a table.
        value: the figure itself, by rule a median; None when it could not be measured: `note` says why.
        promise: key in `PROMISES`.
        samples: what `value` is the median of; their number and range are told.
        quantities: what the promise's limit is computed from.
    """
    record: dict[str, Any] = {
        "title": title,
        "value": value,
        "unit": unit,
        "note": note,
        "command": command(),
    }
    if samples:
        record |= {"count": len(samples), "lowest": min(samples), "highest": max(samples)}
    if promise is not None:
        record["promised"] = PROMISES[promise].text
        if value is not None:
            record["met"] = PROMISES[promise].is_met(value, quantities)
    log(f"{title}: {format_value(record)}{format_verdict(record)}")
    path = os.environ.get(RECORDS_VARIABLE)
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def report_median(title: str, samples: Sequence[float], unit: str, **options: Any) -> None:
    """`report` of the median of samples."""
    report(title, statistics.median(samples), unit, samples=samples, **options)


def command() -> str:
    """The running command, as it can be typed in the clone."""
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    threads = os.environ.get("OMP_NUM_THREADS")
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(words)


def format_value(record: dict[str, Any]) -> str:
    """`1.02 × (median of 8, 0.98 to 1.05)`."""
    if record["value"] is None:
        return record["note"]
    text = f"{_format(record['value'])} {record['unit']}".strip()
    details = []
    if record.get("count", 0) > 1:
        lowest, highest = _format(record["lowest"]), _format(record["highest"])
        details.append(f"median of {record['count']}, {lowest} to {highest}")
    if record["note"]:
        details.append(record["note"])
    return f"{text} ({'; '.join(details)})" if details else text


def format_verdict(record: dict[str, Any]) -> str:
    if "promised" not in record:
        return ""
    verdict = {True: ": met", False: ": NOT met", None: ""}[record.get("met")]
    return f"; promised: {record['promised']}{verdict}"


def _format(value: float) -> str:
    """Three or more significant digits."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.2f}"
    if abs(value) >= 0.1:
        return f"{value:.3f}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Machine:
    """Kind of a machine, in words for a table and for a file's name."""

    cores: int
    memory_gb: int
    gpu: str | None

    @property
    def kind(self) -> str:
        if self.gpu is None:
            return f"cpu-{self.cores}-cores"
        return self.gpu.removeprefix("NVIDIA ").lower().replace(" ", "-")


def this_machine() -> Machine:
    """Asks the driver's tool, so that torch need not be imported."""
    import shutil
    import subprocess

    import psutil

    gpu = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        gpu = names[0].strip() if names else None
    memory_gb = round(psutil.virtual_memory().total / 1e9)
    return Machine(len(os.sched_getaffinity(0)), memory_gb, gpu)


def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of packages; "not installed" where one is not."""
    import importlib.metadata
    import platform

    versions = {"Python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
