"""Finding and signalling the processes of one run: real processes, and an ssh that stays on this machine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from colossal_llama.launch import host_processes
from colossal_llama.launch.host_processes import TORCHRUN, TRAINING, HostProcesses, signal_command

# Notes what it was asked, and runs the command here.
SSH = """#!/bin/bash
printf '%s\\n' "${*:1:$#-1}" >>"${0%/*}/asked"
exec bash -c "${*: -1}"
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_processes_of_the_run_are_found_whatever_the_names(locale: str, tmp_path: Path) -> None:
    """The environment and save_dir may have spaces and Chinese in their paths; another run is left alone."""
    python = tmp_path / "my 环境" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.symlink_to(Path(sys.executable).resolve())
    (tmp_path / "train.py").write_text("import time; print('ready', flush=True); time.sleep(60)")
    (tmp_path / "torchrun").symlink_to("train.py")
    directories = ["所有 runs/trial", "所有 runs/trial2", "runs/trial"]
    commands = [["-u", "train.py", "--save_dir", name] for name in directories]
    commands += [[str(tmp_path / "torchrun"), "--x", "train.py", f"--save_dir={directories[0]}", "--lr", "1"]]
    processes = [
        subprocess.Popen([python, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for words in commands
    ]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in processes)
        for before, ended in ((TRAINING, [0]), (TORCHRUN, [0, 3])):
            command = signal_command(signal.SIGTERM, before, directories[0])
            subprocess.run(
                ["bash", "-c", command], env={"LC_ALL": locale, "PATH": "/usr/bin:/bin"}, check=True
            )
            for number in ended:
                assert processes[number].wait(timeout=10) == -signal.SIGTERM
            running = [number for number, process in enumerate(processes) if process.poll() is None]
            assert running == [number for number in range(4) if number not in ended]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ssh of this test notes what it was asked."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path / "asked"


def start_worker(directory: Path) -> subprocess.Popen:
    """A process that looks like one of training with the directory's `runs` as save_dir."""
    (directory / "train.py").write_text("import time; time.sleep(60)")
    words = [sys.executable, "-u", "train.py", "--save_dir", f"{directory}/runs"]
    return subprocess.Popen(words, cwd=directory)


def wait_for(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_every_host_is_asked_over_ssh(ssh: Path, tmp_path: Path) -> None:
    processes = HostProcesses(["host-a", "host-b"], "2222", str(tmp_path / "runs"))
    processes.kill()
    wait_for(lambda: ssh.is_file() and len(ssh.read_text().splitlines()) == 2)
    processes.close()
    options = "-o BatchMode=yes -o ConnectTimeout=10 -p 2222"
    assert sorted(ssh.read_text().splitlines()) == [f"{options} host-a", f"{options} host-b"]


@pytest.mark.parametrize("hosts", [None, ["host-a"]])
def test_a_stop_waits_for_processes_that_are_being_started(
    hosts: list[str] | None, ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_processes, "RETRY_SECONDS", 0.1)
    processes = HostProcesses(hosts, None, str(tmp_path / "runs"))
    processes.save_and_stop()
    time.sleep(0.3)
    worker = start_worker(tmp_path)
    assert worker.wait(timeout=10) == -signal.SIGTERM
    processes.close()


def test_kill(ssh: Path, tmp_path: Path) -> None:
    worker = start_worker(tmp_path)
    processes = HostProcesses(None, None, str(tmp_path / "runs"))
    time.sleep(0.2)  # its command line is Python's from the start of Python on
    processes.end_launchers()
    processes.kill()
    assert worker.wait(timeout=10) == -signal.SIGKILL
    processes.close()


def test_close_ends_an_ssh_that_hangs(tmp_path: Path, ssh: Path) -> None:
    (tmp_path / "ssh").write_text('#!/bin/bash\necho $$ >"${0%/*}/asked"; sleep 60 & wait\n')
    processes = HostProcesses(["host-a"], None, str(tmp_path / "runs"))
    processes.save_and_stop()
    wait_for(lambda: ssh.is_file() and ssh.read_text().endswith("\n"))
    started = time.monotonic()
    processes.close()
    assert time.monotonic() - started < 2
    processes.kill()  # starts nothing any more
    assert not Path(f"/proc/{ssh.read_text().strip()}").exists()


def test_a_machine_without_ssh_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    processes = HostProcesses(["host-a"], None, "runs")
    processes.kill()
    processes.close()
    assert capfd.readouterr().err in ("", "ssh: No such file or directory\n")
