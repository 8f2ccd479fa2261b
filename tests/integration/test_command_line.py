"""What every script promises at its prompt: help in under a second, all bad arguments at once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT, load_script

SCRIPTS = load_script(ROOT / "docs" / "make_arguments.py").SCRIPTS
# Words without a flag are the command that it checks, so it names the unknown flag alone.
TAKES_OTHERS = "colossal_llama/launch/preflight.py"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_in_under_a_second(root: Path, script: str) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, str(root / script), "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - start)
    assert result.stdout.startswith("usage: ")
    assert result.stderr == ""
    assert min(times) < 1


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != TAKES_OTHERS])
def test_unknown_arguments_are_refused_without_a_traceback(root: Path, script: str) -> None:
    result = subprocess.run(
        [sys.executable, str(root / script), "--no_such_flag", "1"], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "unknown arguments: --no_such_flag 1" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_train_reports_all_bad_arguments_at_once(root: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [
            sys.executable,
            str(root / "train.py"),
            "--lr",
            "abc",
            "--plugin",
            "nope",
            "--pretrained",
            "/missing",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 2
    for value in ("--lr abc", "--plugin nope", "--pretrained /missing"):
        assert f"error: {value}: " in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
