"""examples/study in its short form: killed in the middle, continued, and reported.

Slow: some minutes, for it runs about thirty scripts; each is tested by itself elsewhere.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KILLED_IN = "base_vocabulary-1"


def test_short_study(root: Path, tmp_path: Path) -> None:
    work_dir, report_dir = tmp_path / "study", tmp_path / "report"
    command = [sys.executable, root / "examples/study/run_study.py", "--short", "--work_dir", work_dir]

    # Killed without warning, with all that it has started.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path)
    started = work_dir / "steps" / f"{KILLED_IN}.started"
    deadline = time.monotonic() + 1200
    while not started.is_file():
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(3)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.read_bytes() for path in (work_dir / "steps").glob("*.json")}
    assert done
    assert started.is_file()

    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert all(path.read_bytes() == content for path, content in done.items())
    assert result.stdout.count("done before") == len(done)
    assert result.stdout.splitlines()[-1] == f"Study: {work_dir}"
    # Only models are left of the runs.
    assert not list((work_dir / "runs").glob("*/epoch-*"))
    assert (work_dir / "runs" / KILLED_IN / "modeling" / "config.json").is_file()

    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "left:" not in again.stdout

    page = tmp_path / "page.md"
    page.write_text((root / "docs/study.md").read_text(encoding="utf-8"), encoding="utf-8")
    report = [sys.executable, root / "examples/study/report.py", "--output_dir", report_dir, "--page", page]
    subprocess.run([*report, "--work_dir", work_dir], check=True, cwd=tmp_path)
    study = json.loads((report_dir / "study.json").read_text(encoding="utf-8"))
    kinds = {each["kind"]: each["sets"]["zh"]["bits_per_byte"] for each in study["models"]}
    assert {"base", "start_calibrated", "extended", "wsd", "wsd_branch", "merged_extended_50"} <= set(kinds)
    assert kinds["extended"] < kinds["start_calibrated"] < kinds["start_mean"]
    branch, trunk, base = (
        next(run for run in study["runs"] if run["kind"] == kind)
        for kind in ("wsd_branch", "wsd", "base_vocabulary")
    )
    assert branch["steps"] < trunk["steps"] == base["steps"] == 6
    # As the whole comparison says it.
    comparison = json.loads((work_dir / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    bits = [each["bits_per_byte"] for each in comparison["results"] if each["category"] is None]
    assert bits[: len(kinds)] == pytest.approx(list(kinds.values()))
    text = page.read_text(encoding="utf-8")
    assert "| `wsd_branch` - `base_vocabulary` |" in text
    assert all((report_dir / f"study_{name}.png").is_file() for name in ("curves", "results", "replay"))

    # From the figures alone, the same.
    subprocess.run([*report, "--study", report_dir / "study.json"], check=True, cwd=tmp_path)
    assert page.read_text(encoding="utf-8") == text
