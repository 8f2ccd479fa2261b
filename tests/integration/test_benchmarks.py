"""The benchmarks run, at toy shapes, and their results file holds what they handed in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

ALL = [
    *(
        "init_tokenizer",
        "init_model",
        "prepare_dataset",
        "prepare_byte_level",
        "prepare_peer",
        "packing_peer",
        "train_step",
        "checkpoint",
    ),
    *("sft_padding", "start_up", "scaling", "gpu"),
]
# What is nowhere else in a fast test and takes seconds; the others are for --run-slow.
FAST = ["packing_peer", "train_step", "gpu"]


def run_benchmarks(output: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "benchmarks" / "run.sh"), "--toy", "--output", str(output), *arguments]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})


def table_of(results: Path) -> dict[str, tuple[str, ...]]:
    """Title of a figure -> (command, measured, promised, met)."""
    rows = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| what", "| ---")):
            title, *cells = (cell.strip() for cell in line.strip("|").split(" |"))
            rows[title] = tuple(cells)
    return rows


def test_results_file_of_some_benchmarks(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    result = run_benchmarks(output, *(word for name in FAST for word in ("--only", name)))
    assert result.returncode == 0, result.stderr
    table = table_of(output)
    command, measured, promised, met = table["training step, ddp × 1, fp32: ours against a bare PyTorch loop"]
    assert "python benchmarks/train_step.py --pairs 1" in command
    assert measured.endswith("×")
    assert promised == "at most 1.03 × a bare loop"
    assert met == "toy"
    assert any("transformers.Trainer" in title for title in table)
    assert table["tokens lost, ours"][1].startswith("0 of ")
    assert any("trl 0.19.1" in title and "one batch of our pieces" in title for title in table)
    assert any(title.startswith("toy, 32 tokens, bf16: zero2") for title in table)
    assert any("bare loop" in title for title in table)
    text = output.read_text(encoding="utf-8")
    assert "Toy shapes" in text
    for name in FAST:
        assert f"## {name}, " in text
    assert "failed" not in text


@pytest.mark.slow
def test_results_file_of_all_benchmarks(tmp_path: Path) -> None:
    output = tmp_path / "results.md"
    result = run_benchmarks(output)
    assert result.returncode == 0, result.stderr
    text = output.read_text(encoding="utf-8")
    for name in ALL:
        assert f"## {name}, " in text
    assert "failed" not in text
    assert output.with_suffix(".png").stat().st_size > 10_000
    table = table_of(output)
    for start in ("init_tokenizer.py", "init_model.py", "prepare_pretrain", "SFT, packed", "start-up of"):
        assert any(title.startswith(start) for title in table), start


def test_a_failing_benchmark_is_told_and_the_others_run(tmp_path: Path) -> None:
    """A `python` that fails for one script stands for a benchmark that breaks."""
    fake = tmp_path / "bin"
    fake.mkdir()
    real = sys.executable
    (fake / "python").write_text(
        "#!/usr/bin/env bash\n"
        'if [[ $1 == benchmarks/train_step.py ]]; then echo "no such luck" >&2; exit 7; fi\n'
        f'exec "{real}" "$@"\n'
    )
    (fake / "python").chmod(0o755)
    output = tmp_path / "results.md"
    result = subprocess.run(
        [
            *("env", f"PATH={fake}:/usr/bin:/bin", "bash", str(ROOT / "benchmarks" / "run.sh"), "--toy"),
            *("--output", str(output), "--only", "train_step", "--only", "packing_peer"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "failed: train_step" in result.stderr
    text = output.read_text(encoding="utf-8")
    assert "## train_step, 0 s, **failed with exit code 7**" in text
    assert "no such luck" in text
    assert "packing alone, ours" in text


def test_unknown_names_are_refused() -> None:
    script = str(ROOT / "benchmarks" / "run.sh")
    result = subprocess.run(["bash", script, "--only", "nonsense"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "error: --only nonsense: there are init_tokenizer init_model" in result.stderr


def test_without_a_gpu_the_results_say_so(tmp_path: Path) -> None:
    """The script that measures on a GPU hands in a line instead of figures."""
    records = tmp_path / "records.jsonl"
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_step.py")],
        check=True,
        capture_output=True,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(ROOT), "BENCHMARK_RECORDS": str(records)},
    )
    (record,) = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert record["value"] is None
    assert record["note"] == "no GPU figure exists"
    assert "met" not in record
