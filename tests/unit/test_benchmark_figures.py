"""How a benchmark's figure is judged, printed and handed in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import ROOT, load_script


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "records.jsonl"
    monkeypatch.setenv("BENCHMARK_RECORDS", str(path))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr("sys.argv", ["benchmarks/some.py", "--name", "two words"])
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_median_promise_and_command_are_handed_in(records: Path, capsys: pytest.CaptureFixture) -> None:
    figures = load_script(ROOT / "benchmarks" / "figures.py")
    figures.report_median("a step", [1.0, 1.1, 1.02], "×", promise="train_step.ratio")
    figures.report_median("a slow step", [1.0, 1.1, 1.04], "×", promise="train_step.ratio")
    first, second = read(records)
    assert (first["value"], first["count"], first["lowest"], first["highest"]) == (1.02, 3, 1.0, 1.1)
    assert first["met"] is True
    assert second["met"] is False
    assert first["command"] == "OMP_NUM_THREADS=2 python benchmarks/some.py --name 'two words'"
    out = capsys.readouterr().out
    assert "a step: 1.020 × (median of 3, 1.000 to 1.100); promised: at most 1.03 × a bare loop: met" in out
    assert "NOT met" in out


def test_limits_may_depend_on_what_was_measured(records: Path) -> None:
    figures = load_script(ROOT / "benchmarks" / "figures.py")
    for seconds in (9.9, 10.1):
        figures.report("init", seconds, "s", promise="init_model.seconds", copy_seconds=2.0)
    figures.report("fill", 99.4, "%", promise="prepare.fill")
    assert [record["met"] for record in read(records)] == [True, False, False]


def test_a_figure_that_is_not_there_is_not_judged(records: Path, capsys: pytest.CaptureFixture) -> None:
    figures = load_script(ROOT / "benchmarks" / "figures.py")
    figures.report("MFU", None, "%", promise="gpu.mfu", note="no GPU figure exists")
    (record,) = read(records)
    assert "met" not in record
    assert capsys.readouterr().out.startswith("MFU: no GPU figure exists; promised: at least 55 %")


def test_then_and_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = tmp_path / "2026-01-01_cpu-2-cores.md"
    earlier.write_text(
        "| what | command | measured | promised | met |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| data, 2 workers: speed | `python x.py` | 1,600.5 rows/s (median of 3, 1 to 2) | fast | yes |\n"
        "| step: ours | `python y.py` | 2.000 s |  |  |\n"
        "| gone | `python y.py` | 1.000 s |  |  |\n",
        encoding="utf-8",
    )
    records = [
        {"title": "data, 2 workers, hf: speed", "value": 3201.0, "unit": "rows/s", "note": "one", "count": 3},
        {"title": "step: ours", "value": None, "unit": "s", "note": "not measured"},
        {"title": "new", "value": 1.0, "unit": "s", "note": ""},
    ]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    write_results = load_script(ROOT / "benchmarks" / "write_results.py")
    lines = write_results._then_and_now(earlier, records)
    assert lines[-1] == "| data, 2 workers, hf: speed | 1,600.5 rows/s | 3,201 rows/s | 2.000 |"
    assert not any(line.startswith(("| step", "| new", "| gone")) for line in lines)
