"""The script for the first run on a GPU: time limits, failures, results; a slow test runs its parts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "tests" / "gpu"))

from bench import FAILED, LATE, NOT_RUN, OK, SKIPPED, Bench, Failed, Part, Skipped, last_words
from parts import CURVE_TOLERANCE, compare, parts

SCRIPT = ROOT / "tests" / "gpu" / "run.sh"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("bench.machine_facts", lambda: {"GPUs": "one | two"})
    return Bench(tmp_path, tmp_path / "results.md")


def part_of(name: str, *cases, seconds: float = 60) -> Part:
    return Part(name, "why", seconds, lambda bench: cases)


def shell(bench: Bench, script: str):
    return lambda: bench.command(["bash", "-c", script]).strip()


def statuses(bench: Bench) -> dict[str, str]:
    return {result.case: result.status for result in bench.results}


def test_a_failure_does_not_end_the_others(bench: Bench) -> None:
    def refuse() -> str:
        raise Skipped("no such GPU")

    def wrong() -> str:
        raise Failed("losses differ", "the whole story")

    cases = [
        ("right", shell(bench, "echo fine")),
        ("exits", shell(bench, "echo 'error: no luck' >&2; exit 3")),
        ("raises", lambda: 1 // 0),
        ("wrong", wrong),
        ("refused", refuse),
    ]
    assert not bench.run_parts([part_of("first", *cases), part_of("second", ("after", lambda: "x"))], 60)
    assert statuses(bench) == {
        "right": OK,
        "exits": FAILED,
        "raises": FAILED,
        "wrong": FAILED,
        "refused": SKIPPED,
        "after": OK,
    }
    details = {result.case: result.detail for result in bench.results}
    assert details["right"] == "fine"
    assert details["exits"] == "exit code 3: error: no luck"
    assert details["raises"].startswith("ZeroDivisionError")
    text = bench.output.read_text(encoding="utf-8")
    assert "| GPUs | one \\| two |" in text
    assert "| first | wrong | FAILED | 0 | losses differ |" in text
    assert "## first: wrong\n\n```\nthe whole story\n```" in text
    data = json.loads(bench.output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [result["case"] for result in data["results"]] == list(statuses(bench))


def test_all_right(bench: Bench) -> None:
    assert bench.run_parts([part_of("only", ("right", lambda: ""))], 60)


def test_a_part_is_stopped_at_its_time(bench: Bench) -> None:
    """With all processes that its command has started; the next part has time of its own."""
    pid_file = bench.work / "pid"
    stuck = shell(bench, f"sleep 60 & echo $! >{pid_file}; echo begun; wait")
    first = part_of("stuck", ("hangs", stuck), ("never", lambda: ""), seconds=0.5)
    started = time.monotonic()
    assert not bench.run_parts([first, part_of("next", ("runs", lambda: ""))], 60)
    assert time.monotonic() - started < 20
    assert statuses(bench) == {"hangs": LATE, "never": NOT_RUN, "runs": OK}
    assert "begun" in bench.results[0].output
    state = Path(f"/proc/{pid_file.read_text().strip()}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("its process is still there")


def test_the_whole_time_is_a_limit_too(bench: Bench) -> None:
    assert not bench.run_parts([part_of("late", ("never", lambda: ""))], 0)
    assert statuses(bench) == {"never": NOT_RUN}


def test_a_preparation_that_fails_is_a_case(bench: Bench) -> None:
    def cases(bench: Bench):
        bench.command(["false"])
        yield "never", lambda: ""

    assert not bench.run_parts([Part("broken", "why", 60, cases), part_of("next", ("runs", lambda: ""))], 60)
    assert statuses(bench) == {"preparation": FAILED, "runs": OK}


def test_a_call_of_nvcc_is_a_failure(bench: Bench) -> None:
    bench.remove_nvcc()
    cases = [("compiles", shell(bench, "nvcc --version || true")), ("does not", shell(bench, "python -V"))]
    assert not bench.run_parts([part_of("install", *cases)], 60)
    assert statuses(bench) == {"compiles": FAILED, "does not": OK}
    assert bench.results[0].detail == "nvcc was called"
    assert "no_cuda_home" in shell(bench, "echo $CUDA_HOME")()


def test_results_are_there_before_the_end(bench: Bench) -> None:
    seen = []

    def look() -> str:
        seen.append(bench.output.read_text(encoding="utf-8"))
        return ""

    bench.run_parts([part_of("one", ("first", lambda: "done"), ("second", look))], 60)
    assert "| one | first | ok | 0 | done |" in seen[0]


def test_curves_are_compared_step_by_step() -> None:
    assert "within 1.0e-02" in compare([6.0, 5.05], [6.0, 5.0])
    for found in ([6.0, 5.0 * (1 + 2 * CURVE_TOLERANCE)], [6.0, float("nan")], [6.0]):
        with pytest.raises(Failed):
            compare(found, [6.0, 5.0])


def test_the_line_that_says_most() -> None:
    said = "loading\nValueError: no\nerror: --lr 0: too small\ntorch.x.ChildFailedError: \nbye\n"
    assert last_words(said) == "error: --lr 0: too small"
    assert last_words("one\ntwo\n") == "two"


def test_the_order_of_the_parts() -> None:
    names = [part.name for part in parts()]
    assert names[0] == "install"
    assert names[-1] == "benchmarks"
    listed = subprocess.run(["bash", SCRIPT, "--list"], capture_output=True, text=True, check=True).stdout
    assert [line.partition(":")[0] for line in listed.splitlines()] == names


@pytest.mark.slow
def test_toy_shapes_on_a_cpu(tmp_path: Path) -> None:
    """About 50 runs of `train.py`: every part as on a GPU."""
    output = tmp_path / "results.md"
    done = subprocess.run(
        ["bash", SCRIPT, "--toy", "--output", output, "--seconds", "3000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["results"]
    assert {result["part"] for result in results} == {part.name for part in parts()}
    assert {result["status"] for result in results} <= {OK, SKIPPED}
