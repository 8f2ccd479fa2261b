"""The seam: the same results from this process and from several, and a worker that dies is reported."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from colossal_llama.dataset.workers import LocalWorkers, open_workers
from colossal_llama.utils.errors import UserError


def square(number: int) -> int:
    return number * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


LOADED: list[int] = []


def load(number: str) -> None:
    LOADED.append(int(number))


def loaded(_: int) -> list[int]:
    return LOADED


def complain(number: int) -> int:
    raise UserError([f"problem {number}", "another"])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_task_once(num_workers: int) -> None:
    with open_workers("none", num_workers, [square]) as workers:
        assert sorted(workers.run(square, range(20))) == [(i, i * i) for i in range(20)]
        assert list(workers.run(square, [])) == []
        assert sorted(workers.run(square, [3])) == [(0, 9)]


def test_tasks_are_taken_no_faster_than_they_are_done() -> None:
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    with LocalWorkers(2, [square]) as workers:
        for count, _ in enumerate(workers.run(square, tasks()), start=1):
            assert len(taken) <= count + 4


def blocked_signals(_: int) -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_ctrl_c_does_not_reach_workers() -> None:
    with LocalWorkers(2, [blocked_signals]) as workers:
        assert all(signal.SIGINT in found for _, found in workers.run(blocked_signals, range(4)))
    assert signal.SIGINT not in blocked_signals(0)


shares_what_is_loaded = pytest.mark.skipif(
    sys.version_info < (3, 11), reason="with Python 3.10, workers are spawned: see LocalWorkers"
)


@shares_what_is_loaded
def test_workers_share_what_was_loaded_before_they_were_forked() -> None:
    for number in (5, 6):  # the second ones are forked from another server
        with LocalWorkers(2, [loaded]) as workers:
            workers.preload(load, str(number))
            assert list(workers.run(loaded, [0, 0, 0])) != []
            assert all(found == [number] for _, found in workers.run(loaded, range(4)))
    assert LOADED == []
    assert not [name for name in os.environ if "PRELOAD" in name]


def test_what_can_not_be_loaded_early_is_left_to_the_tasks() -> None:
    with LocalWorkers(2, [square]) as workers:
        workers.preload(load, "no number")
        assert sorted(workers.run(square, range(4))) == [(i, i * i) for i in range(4)]


def test_workers_that_are_not_needed_end_at_once() -> None:
    with LocalWorkers(2, [loaded]) as workers:
        workers.preload(load, "5")
    assert multiprocessing.forkserver._forkserver._forkserver_pid is None


PROGRAM = """
import signal, sys, time
from colossal_llama.dataset.workers import LocalWorkers
from colossal_llama.utils import errors

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where it is ignored
    with LocalWorkers(2, [errors.run_command]) as workers:
        workers.preload(time.sleep, float(sys.argv[1])) if len(sys.argv) > 1 else None
        print("started", flush=True)
        print([path for _, path in workers.run(eval, ["__import__('colossal_llama').__file__"] * 4)])
"""


def test_workers_run_the_code_of_the_command_wherever_it_is_started(tmp_path: Path) -> None:
    (tmp_path / "colossal_llama" / "dataset").mkdir(parents=True)
    for directory in ("colossal_llama", "colossal_llama/dataset"):
        (tmp_path / directory / "__init__.py").write_text("print('the wrong one')")
    (tmp_path / "numpy.py").write_text("print('the wrong one')")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, scripts / "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    paths = [str(ROOT / "colossal_llama" / "__init__.py")] * 4
    assert result.stdout == f"started\n{paths}\n", result.stdout + result.stderr


@shares_what_is_loaded
def test_ctrl_c_does_not_wait_for_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", "60"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.count("Traceback") <= 1, errors  # the command's own
    assert process.returncode != 0


def test_a_killed_worker_is_an_error_with_a_remedy() -> None:
    with LocalWorkers(2, [die]) as workers, pytest.raises(UserError, match="fewer --num_workers"):
        list(workers.run(die, range(4)))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_users_errors_pass_through(num_workers: int) -> None:
    with (
        LocalWorkers(num_workers, [complain]) as workers,
        pytest.raises(UserError, match=r"problem 0\nanother"),
    ):
        list(workers.run(complain, [0]))
