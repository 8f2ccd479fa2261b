"""Reads what run_study.py left in its work directory: one dictionary with every figure of the study."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from arms import ARMS, BASELINE, MERGE_SHARES, MERGED_ARMS
from rates import choose_rate, read_looks, read_metrics
from run_study import LANGUAGES, SETTINGS_FILE, WINDOWS

from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json

PACKAGES = ("torch", "transformers", "colossalai", "tokenizers", "gguf", "tuetoken")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# What is subtracted from what: the answers to the questions of the study.
DIFFERENCES = (
    *((arm.name, BASELINE) for arm in ARMS if arm.name != BASELINE),
    ("wsd_branch", "base_vocabulary"),
    ("no_replay", "much_replay"),
    *((f"merged_{arm}_{100 * share:.0f}", arm) for arm in MERGED_ARMS for share in MERGE_SHARES),
    *(
        (f"merged_no_replay_{100 * share:.0f}", other)
        for share in MERGE_SHARES
        for other in (BASELINE, "much_replay")
    ),
    ("start_calibrated", "start_mean"),
    ("start_half", "start_calibrated"),
)


def collect(work_dir: Path) -> dict[str, Any]:
    if not (work_dir / "comparison" / "comparison.json").is_file():
        raise UserError(f"--work_dir {work_dir}: holds no finished study; run_study.py comes before")
    settings = read_json(work_dir / SETTINGS_FILE)
    estimates = read_estimates(work_dir)
    models, differences = read_comparison(work_dir, settings)
    runs = read_runs(work_dir, settings, estimates)
    return {
        "format": 1,
        "date": date.today().isoformat(),
        "settings": settings,
        "environment": describe_environment(),
        "arms": [
            {"name": arm.name, "question": arm.question, "about": arm.about}
            for arm in ARMS
            if arm.name in settings["arms"]
        ],
        "text": read_text(work_dir),
        "rate": read_rate(work_dir, settings),
        "models": models,
        "differences": differences,
        "runs": runs,
        "break_even": find_break_even(runs),
        "estimates": estimates,
        "tokenizers": read_json(work_dir / "tokenizers.json"),
        "ledger": read_ledger(work_dir),
        "steps": [read_json(path) for path in sorted((work_dir / "steps").glob("*.json"))],
    }


@contextmanager
def current_directory(directory: Path) -> Iterator[None]:
    """The commands of a study have paths below its work directory."""
    before = Path.cwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def describe_environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8"))):
        cpu = found[1]
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), "versions": versions}


def read_text(work_dir: Path) -> dict[str, Any]:
    """Sections and bytes of each part and category, and tokens of the training text by vocabulary."""
    parts = {"training": "corpora", "validation": "text/validation", "test": "text/test"}
    sizes: dict[str, Any] = {}
    for part, directory in parts.items():
        for language in LANGUAGES:
            categories: dict[str, list[int]] = {}
            for path in sorted((work_dir / directory / language).glob("*.jsonl")):
                for line in path.read_text(encoding="utf-8").splitlines():
                    record = json.loads(line)
                    counts = categories.setdefault(record["category"], [0, 0, 0])
                    text = record["source"] + record["target"]
                    counts[0] += 1
                    counts[1] += len(text.encode())
                    counts[2] += len(text)
            sizes.setdefault(part, {})[language] = {
                "sections": sum(each[0] for each in categories.values()),
                "bytes": sum(each[1] for each in categories.values()),
                "characters": sum(each[2] for each in categories.values()),
                "categories": categories,
            }
    tokens = {
        vocabulary: {
            language: read_json(work_dir / "data" / vocabulary / language / "stats.json")["rows"]["tokens"]
            for language in LANGUAGES
        }
        for vocabulary in ("base", "extended")
    }
    return {"parts": sizes, "tokens": tokens}


def read_rate(work_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if settings["learning_rate"] is not None:
        return {"chosen": settings["learning_rate"], "looks": []}
    rates = settings["look"]["rates"]
    return {
        "chosen": choose_rate(work_dir, rates),
        "looks": read_looks(work_dir, rates),
        "steps": settings["look"]["steps"],
    }


def read_comparison(
    work_dir: Path, settings: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Bits per byte of each kind of model, all seeds together, and the differences between kinds.

    A kind is an arm, a start, or a merge. Its figure is the mean over its seeds; intervals are over
    documents, of that mean. compare_models.py's own functions find the scores in its files, without a model.
    """
    from colossal_llama.evaluation.compare_models import CompareSettings, score_models
    from colossal_llama.evaluation.comparison import bits_per_byte, bootstrap_intervals
    from colossal_llama.evaluation.held_out_text import read_documents
    from colossal_llama.evaluation.models import find_models, prepare_models

    names = list(settings["models"])
    with current_directory(work_dir):
        compared = CompareSettings(
            models=list(settings["models"].values()),
            data_input_dirs=[Path("text/test") / language for language in LANGUAGES],
            output_dir=Path("comparison"),
            context_bytes=int(WINDOWS[1]),
            stride_bytes=int(WINDOWS[3]),
        )
        documents = read_documents(compared.data_input_dirs)
        prepared = prepare_models(
            find_models(compared.models), documents, compared.context_bytes, compared.stride_bytes
        )
        scores = dict(zip(names, score_models(compared, prepared), strict=True))
    sizes = np.array([document.num_bytes for document in documents], dtype=np.float64)
    characters = np.array([len(document.text) for document in documents])
    sets = {
        language: np.array([number for number, each in enumerate(documents) if each.set == language])
        for language in LANGUAGES
    }
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"-\d+$", "", name), []).append(name)

    def bits(name: str, numbers: np.ndarray) -> float:
        return bits_per_byte(scores[name].losses[numbers].sum(), sizes[numbers].sum())

    def compare(first: Sequence[str], second: Sequence[str], numbers: np.ndarray) -> dict[str, Any]:
        losses = [
            np.mean([scores[name].losses[numbers] for name in members], axis=0) for members in (first, second)
        ]
        difference = losses[0] - losses[1]
        (interval,) = bootstrap_intervals(difference[None], sizes[numbers])
        seeds = [bits(a, numbers) - bits(b, numbers) for a, b in zip(first, second, strict=False)]
        return {
            "change": bits_per_byte(difference.sum(), sizes[numbers].sum()),
            "interval": interval,
            "seeds": seeds if len(first) == len(second) else [],
        }

    models = []
    for kind, members in kinds.items():
        figures = {}
        for language, numbers in sets.items():
            of_seeds = [bits(name, numbers) for name in members]
            cost = scores[members[0]].new_rows_losses
            figures[language] = {
                "bits_per_byte": mean(of_seeds),
                "seeds": of_seeds,
                **{f"base_{key}": value for key, value in compare(members, kinds["base"], numbers).items()},
                "documents": len(numbers),
                "bytes": int(sizes[numbers].sum()),
                "tokens_per_character": float(
                    scores[members[0]].num_tokens[numbers].sum() / characters[numbers].sum()
                ),
                "cost_of_new_rows": None
                if cost is None
                else bits_per_byte(cost[numbers].sum(), sizes[numbers].sum()),
            }
        models.append({"kind": kind, "models": members, "sets": figures})
    differences = [
        {
            "first": first,
            "second": second,
            "sets": {
                language: compare(kinds[first], kinds[second], numbers) for language, numbers in sets.items()
            },
        }
        for first, second in dict.fromkeys(DIFFERENCES)
        if first in kinds and second in kinds
    ]
    return models, differences


def read_runs(work_dir: Path, settings: dict[str, Any], estimates: dict[str, Any]) -> list[dict[str, Any]]:
    """Each training run of an arm: its curve on validation text, and what it took, all stages together."""
    text = read_text(work_dir)
    runs = []
    for arm in ARMS:
        if arm.name not in settings["arms"]:
            continue
        bytes_of_token = text["parts"]["training"]["zh"]["bytes"] / text["tokens"][arm.vocabulary]["zh"]
        kinds = [arm.name, *([f"{arm.name}_branch"] if arm.schedule == "wsd" else [])]
        for seed in settings["seeds"]:
            for kind in kinds:
                stages = [f"{kind}-{seed}"]
                if arm.rows_first:
                    stages.insert(0, f"{arm.name}_rows-{seed}")
                run = read_run(work_dir, stages, bytes_of_token)
                estimate = estimates.get(estimate_of(arm.start, settings["arms"]), {})
                if per_token := estimate.get("flops_per_token"):
                    run["flops"] = per_token * run["tokens"]
                runs.append({"kind": kind, "seed": seed, **run})
    return runs


def estimate_of(start: str, chosen: Sequence[str]) -> str:
    """The arm whose dry run is about the same model: the first with this start."""
    return next(arm.name for arm in ARMS if arm.start == start and arm.name in chosen)


def read_run(work_dir: Path, stages: Sequence[str], bytes_of_token: float) -> dict[str, Any]:
    curve: list[dict[str, float]] = []
    speeds: list[float] = []
    steps = tokens = 0
    chinese, seconds, peak = 0.0, 0.0, 0
    for stage in stages:
        records = read_metrics(work_dir / "runs" / stage)
        for record in records:
            if "eval_bits_per_byte" in record and not (curve and record["step"] == 0):
                point = {"step": steps + record["step"], "tokens": tokens + record["tokens"]}
                point |= {language: record[f"eval_bits_per_byte/{language}"] for language in LANGUAGES}
                curve.append(point)
            if "tokens_per_second" in record:
                speeds.append(record["tokens_per_second"])
        last = records[-1]
        steps, tokens = steps + last["step"], tokens + last["tokens"]
        # With a single set there are no figures of each.
        chinese += last.get("tokens/zh", last["tokens"])
        finished = read_json(work_dir / "steps" / f"{stage}.json")
        seconds += finished["seconds"]
        peak = max(peak, finished["peak_memory_bytes"])
    return {
        "curve": curve,
        "steps": steps,
        "tokens": tokens,
        "chinese_bytes": round(chinese * bytes_of_token),
        "tokens_per_second": median(speeds),
        "seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
    }


def find_break_even(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the extended vocabulary's mean curve on Chinese validation text falls below the base's.

    Tokens are also FLOPs here, up to the few per cent that the larger head costs.
    """
    curves = {
        kind: mean_curve([run["curve"] for run in runs if run["kind"] == kind], "zh")
        for kind in ("base_vocabulary", BASELINE)
    }
    if not all(curves.values()):
        return {}
    base, extended = curves["base_vocabulary"], curves[BASELINE]
    points = [
        {"step": step, "tokens": tokens, "base": base[step][1], "extended": bits}
        for step, (tokens, bits) in extended.items()
        if step in base
    ]
    crossing = None
    for before, after in pairwise(points):
        gaps = [point["extended"] - point["base"] for point in (before, after)]
        if gaps[0] > 0 >= gaps[1]:
            share = gaps[0] / (gaps[0] - gaps[1])
            crossing = before["tokens"] + share * (after["tokens"] - before["tokens"])
    return {"points": points, "tokens": crossing}


def mean_curve(curves: Sequence[Sequence[dict[str, Any]]], key: str) -> dict[int, tuple[float, float]]:
    """Step -> mean tokens and mean figure, of the steps that all curves have."""
    if not curves:
        return {}
    by_step = [{point["step"]: point for point in curve} for curve in curves]
    common = [step for step in by_step[0] if all(step in each for each in by_step)]
    return {
        step: (mean(each[step]["tokens"] for each in by_step), mean(each[step][key] for each in by_step))
        for step in common
    }


def read_estimates(work_dir: Path) -> dict[str, Any]:
    """What --dry_run said, by arm: its whole text, and the figures that are compared with what was paid."""
    patterns = {
        "parameters": r"^parameters +([\d,]+)",
        "flops_per_token": r"^FLOPs per token +([\d.e+]+)",
        "flops": r"^FLOPs of the run +([\d.e+]+)",
        "bytes": r"^at its fullest +([\d.]+)",
        "bytes_for_saves": r"^CPU memory, copies for saves +([\d.]+)",
    }
    found = {}
    for path in sorted((work_dir / "logs").glob("estimate_*.log")):
        text = path.read_text(encoding="utf-8")
        figures: dict[str, Any] = {}
        for name, pattern in patterns.items():
            if match := re.search(pattern, text, flags=re.MULTILINE):
                figures[name] = float(match[1].replace(",", ""))
        # The table of memory names its unit, which depends on the size of the model.
        if match := re.search(r"^memory of a process \((\w+), estimated\)", text, flags=re.MULTILINE):
            unit = UNITS[match[1]]
            for name in ("bytes", "bytes_for_saves"):
                if name in figures:
                    figures[name] *= unit
        found[path.stem.removeprefix("estimate_")] = figures
    return found


def read_ledger(work_dir: Path) -> dict[str, Any]:
    """The summary, and how pieces fare by the number of their occurrences in the training data."""
    path = work_dir / "ledger" / "ledger.json"
    if not path.is_file():
        return {}
    ledger = read_json(path)
    return {"summary": ledger["summary"], "groups": group_pieces(ledger["pieces"])}


def group_pieces(pieces: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    borders = (0, 1, 10, 30, 100, 10**9)
    for low, high in pairwise(borders):
        members = [each for each in pieces if low <= (each["data_occurrences"] or 0) < high]
        scored = [each for each in members if each["compared"]]
        compared = sum(each["compared"] for each in scored)
        groups.append(
            {
                "from": low,
                "to": high - 1,
                "pieces": len(members),
                "compared": compared,
                "nats": sum(each["mean_nats"] * each["compared"] for each in scored) / max(1, compared),
                "base_nats": sum(each["mean_nats_of_base"] * each["compared"] for each in scored)
                / max(1, compared),
            }
        )
    return groups
