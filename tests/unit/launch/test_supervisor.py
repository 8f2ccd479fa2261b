"""`supervise` as the launch scripts call it: real processes and signals, fakes for `colossalai` and checks.

Two "hosts" are two processes of this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import ROOT

from colossal_llama.launch.supervisor import GracePeriods, newest_checkpoint
from colossal_llama.utils.errors import UserError

# Passes the checks on to ./check, which each test may change; everything else is Python.
PYTHON = f"""#!/bin/bash
case " $* " in
*.preflight\\ * | *\\ --dry_run\\ *) exec bash ./check "$@" ;;
*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""
# Starts a process on each host, and waits for all of them, as `colossalai run` does.
COLOSSALAI = f"""#!{sys.executable}
import json, os, shlex, subprocess, sys, time
from pathlib import Path
Path("environment.json").write_text(json.dumps(dict(os.environ)))
Path("words.json").write_text(json.dumps(sys.argv[1:]))
time.sleep(float(Path("delay").read_text()) if Path("delay").exists() else 0)
words = shlex.split(" ".join(sys.argv[sys.argv.index("train.py"):]))
workers = {{
    host: subprocess.Popen([sys.executable, "-u", *words], env={{**os.environ, "HOST": host}})
    for host in ("host-a", "host-b")
}}
code = 0
while workers:
    for host, worker in list(workers.items()):
        if worker.poll() is not None:
            del workers[host]
            if worker.returncode:
                code = 1
                print(f"Error: failed to run torchrun on {{host}}, is localhost: False", flush=True)
    time.sleep(0.02)
while Path("hang").exists():
    time.sleep(0.02)
sys.exit(code)
"""
# What a process does is in its arguments: --host-a WORD --host-b WORD.
TRAIN = """
import os, signal, sys, time
from pathlib import Path
save_dir = Path(sys.argv[sys.argv.index("--save_dir") + 1])
say = lambda line: os.write(1, (line + "\\n").encode())  # in one piece: two processes write to one pipe
role = sys.argv[sys.argv.index("--" + os.environ["HOST"]) + 1]
def save(*_):
    checkpoint = save_dir / "epoch-0_step-7"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "COMPLETE").touch()
    say("Stopped by SIGTERM after step 7; continue with --load_checkpoint latest")
    os._exit(143)
signal.signal(signal.SIGTERM, save if role == "train" else signal.SIG_IGN)
say(f"{os.environ['HOST']} started")
if role == "finish":
    sys.exit(0)
if role == "fail":
    sys.exit(3)
for step in range(1200):
    say(f"step {step}")
    time.sleep(0.05)
"""


class Launch:
    """`source examples/launch/launch.sh; supervise colossalai run …` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.save_dir = directory, directory / "my runs"
        self.output = directory / "output.txt"
        self.process: subprocess.Popen | None = None

    def start(
        self,
        host_a: str = "train",
        host_b: str = "train",
        prefix: str = "",
        options: str = "",
        **variables: object,
    ) -> None:
        script = self.directory / "train.sh"
        script.write_text(
            f"source {ROOT}/examples/launch/launch.sh\n"
            f"supervise colossalai run --nproc_per_node '' {options} "
            f'train.py --save_dir "{self.save_dir}" --host-a {host_a} --host-b {host_b}\necho not reached\n'
        )
        path = f"{self.directory}/bin:/usr/bin:/bin"
        variables = {"PATH": path, "PYTHONPATH": ROOT, "HOME": "/home/me", "SECRET": "x", **variables}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                ["bash", "-c", f"{prefix} exec bash train.sh"],
                cwd=self.directory,
                env={name: str(value) for name, value in variables.items()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, *texts: str, seconds: float = 20) -> None:
        self.wait_until(lambda: all(text in self.text() for text in texts), seconds)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def wait_for_training(self) -> None:
        self.wait_for("host-a started", "host-b started", "step 1\n")

    def end(self, seconds: float = 20) -> int:
        """The exit code; nothing of the run is left then."""
        code = self.process.wait(timeout=seconds)
        assert self.pids() == [], self.text()
        return code

    def pids(self) -> list[int]:
        """Processes of this directory, the launcher and the relay among them."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(process / "cwd") == str(self.directory) and (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def kill(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    directory = tmp_path / "clone"
    (directory / "bin").mkdir(parents=True)
    for name, text in (("python", PYTHON), ("colossalai", COLOSSALAI)):
        (directory / "bin" / name).write_text(text)
        (directory / "bin" / name).chmod(0o755)
    (directory / "train.py").write_text(TRAIN)
    (directory / "check").write_text("exit 0\n")
    started = Launch(directory)
    yield started
    started.kill()


def read_json(path: Path):
    return json.loads(path.read_text())


def test_a_run_from_start_to_end(launch: Launch) -> None:
    launch.start("finish", "finish", NCCL_DEBUG="INFO", SSH_AUTH_SOCK="/agent")
    assert launch.end() == 0
    first, second, third, starting, *rest = launch.text().splitlines()
    assert first == "No GPU: 2 processes on the CPU of each host"
    assert second == "Checking the hosts"
    assert third == "Checking with train.py --dry_run"
    assert starting.startswith("Starting: colossalai run --nproc_per_node 2 --master_port ")
    assert starting.endswith(f" train.py --save_dir '{launch.save_dir}' --host-a finish --host-b finish")
    assert sorted(rest) == ["host-a started", "host-b started"]
    environment = read_json(launch.directory / "environment.json")
    environment.pop("LC_CTYPE", None)  # Python's own
    assert environment == {
        "PATH": f"{launch.directory}/bin:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": "/home/me",
        "SSH_AUTH_SOCK": "/agent",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [(signal.SIGTERM, "SIGTERM", 143), (signal.SIGINT, "Ctrl-C", 130), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_a_stop_signal_makes_every_host_save(
    number: signal.Signals, name: str, code: int, launch: Launch
) -> None:
    launch.start()
    launch.wait_for_training()
    launch.process.send_signal(number)
    if number == signal.SIGHUP:
        time.sleep(0.1)
        launch.process.send_signal(number)  # the shell and the kernel send one each
    assert launch.end() == code
    assert (launch.save_dir / "epoch-0_step-7" / "COMPLETE").is_file()
    text = launch.text()
    if number == signal.SIGHUP:
        assert name not in text.partition("Stopped by")[0], "the terminal is gone"
        return
    assert f"{name}: telling every host to save and stop; a second signal kills\n" in text
    assert text.count("Stopped by SIGTERM after step 7") == 2
    assert text.endswith(
        f"{name}: every process has saved and exited with code 143\n"
        f"Last complete checkpoint: {launch.save_dir}/epoch-0_step-7; the same command continues from there\n"
    )


def test_ctrl_c_reaches_the_supervisor_alone(launch: Launch) -> None:
    launch.start()
    launch.wait_for_training()
    os.killpg(launch.process.pid, signal.SIGINT)  # as a terminal does
    assert launch.end() == 130
    assert "Ctrl-C: every process has saved and exited with code 143" in launch.text()
    assert "Traceback" not in launch.text()


def test_signals_at_the_very_end_do_not_change_the_exit_code(launch: Launch) -> None:
    launch.start()
    launch.wait_for_training()
    while launch.process.poll() is None:
        launch.process.send_signal(signal.SIGHUP)
        time.sleep(0.001)
    assert launch.process.returncode == 129


def test_a_second_signal_kills(launch: Launch) -> None:
    launch.start("train", "hang")
    launch.wait_for_training()
    launch.process.send_signal(signal.SIGTERM)
    launch.wait_for("Error: failed to run torchrun on host-a")
    assert launch.process.poll() is None
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 143
    assert "SIGTERM again: killing the processes of every host" in launch.text()
    assert "its processes have ended with an error" not in launch.text(), "it was asked to stop"


def test_a_signal_before_training_has_begun(launch: Launch) -> None:
    (launch.directory / "delay").write_text("1")
    launch.start()
    launch.wait_for("Starting: ")
    launch.wait_until((launch.directory / "words.json").exists)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 143
    assert "Last complete checkpoint: " in launch.text()


def test_a_run_that_is_killed_says_that_nothing_was_saved(launch: Launch) -> None:
    launch.start("hang", "hang")
    launch.wait_for_training()
    for _ in range(2):
        launch.process.send_signal(signal.SIGTERM)
        launch.wait_for("SIGTERM: telling")
    assert launch.end() == 143
    assert launch.text().endswith(
        "SIGTERM: training has ended without saving: it had not begun, or was killed\n"
        "Last complete checkpoint: none yet; the same command continues from there\n"
    )


def test_signals_that_are_ignored_stay_ignored(launch: Launch) -> None:
    """Under nohup the end of the terminal is no reason to stop."""
    launch.start(prefix="trap '' HUP;")
    launch.wait_for_training()
    launch.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert launch.process.poll() is None
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 143


def test_what_a_failed_host_leaves_behind_is_ended(launch: Launch) -> None:
    """host-b ignores SIGTERM, and its launcher does not notice its end."""
    (launch.directory / "hang").touch()
    launch.start("fail", "hang", FAILURE_GRACE_SECONDS="0.3", STOP_GRACE_SECONDS="0.5")
    assert launch.end() == 1
    assert [line for line in launch.text().splitlines() if line.startswith("error:")] == [
        "error: host-a: its processes have ended with an error; their messages are above",
        "error: not all hosts have ended 0.3 s after host-a: stopping them",
        "error: not all hosts have ended 0.5 s after that: killing what is left",
    ]
    assert launch.text().endswith(
        "Last complete checkpoint: none yet; the same command continues from there\n"
    )


def test_a_failure_of_every_host_ends_at_once(launch: Launch) -> None:
    launch.start("finish", "fail")
    assert launch.end() == 1
    assert "error: host-b: its processes have ended with an error" in launch.text()
    assert "Last complete checkpoint: none yet" in launch.text()


def test_a_launcher_that_is_killed_has_the_code_of_a_shell(launch: Launch) -> None:
    (launch.directory / "bin" / "colossalai").write_text("#!/bin/bash\necho about to; kill -KILL $$\n")
    launch.start()
    assert launch.end() == 137
    assert launch.text().endswith("about to\n")


def test_a_launcher_that_is_missing(launch: Launch) -> None:
    (launch.directory / "bin" / "colossalai").unlink()
    launch.start()
    assert launch.end() == 2
    assert launch.text().endswith("error: colossalai: not on PATH; activate the project's environment\n")


def test_training_outlives_a_supervisor_that_is_killed(launch: Launch) -> None:
    launch.start()
    launch.wait_for_training()
    launch.process.kill()
    launch.process.wait()
    before = launch.text().count("\nstep ")
    launch.wait_until(lambda: launch.text().count("\nstep ") > before + 10)


def test_it_is_no_process_of_training(launch: Launch) -> None:
    """`pkill -f train.py` does not find it, `pkill -f train.sh` does."""
    launch.start()
    launch.wait_for_training()
    words = Path(f"/proc/{launch.process.pid}/cmdline").read_bytes()
    assert b"train.py" not in words
    assert b"\0train.sh\0" in words


@pytest.mark.parametrize(
    ("check", "code"),
    [("exit 2", 2), ("exit 130", 130), ("kill -KILL $$", 137), ('[[ " $* " != *dry* ]]', 1)],
)
def test_nothing_starts_after_a_check_that_fails(check: str, code: int, launch: Launch) -> None:
    (launch.directory / "check").write_text(f"{check}\n")
    launch.start()
    assert launch.end() == code
    assert "Starting:" not in launch.text()


def test_what_the_checks_are_given(launch: Launch) -> None:
    (launch.directory / "check").write_text('printf "<%s>" "$@"; echo " $HOME $SECRET $WORLD_SIZE"\n')
    launch.start("finish", "finish")
    assert launch.end() == 0
    _, _, preflight, _, dry_run, *_ = launch.text().splitlines()
    words = f"<train.py><--save_dir><{launch.save_dir}><--host-a><finish><--host-b><finish>"
    assert preflight.startswith("<-m><colossal_llama.launch.preflight><--nproc_per_node><2><--master_port><")
    assert preflight.endswith(f">{words} /home/me  ")
    assert dry_run == f"{words}<--dry_run> /home/me  2"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_check(number: signal.Signals, code: int, launch: Launch) -> None:
    """The check gets Ctrl-C and can remove its files."""
    (launch.directory / "check").write_text(
        "trap 'echo removed; exit 130' INT\necho checks; sleep 30 & wait\n"
    )
    launch.start()
    launch.wait_for("checks\n")
    if number == signal.SIGINT:
        os.killpg(launch.process.pid, number)
    else:
        launch.process.send_signal(number)
    assert launch.process.wait(timeout=10) == code
    assert "removed\n" in launch.text()


def test_problems_are_reported_by_it_whatever_the_rank_around_it(launch: Launch) -> None:
    launch.start(FAILURE_GRACE_SECONDS="soon", STOP_GRACE_SECONDS="-1", RANK="3")
    assert launch.end() == 2
    assert launch.text() == (
        "error: FAILURE_GRACE_SECONDS soon: is not a number of seconds\n"
        "error: STOP_GRACE_SECONDS -1: is not a number of seconds\n"
    )


def test_scripts_of_earlier_examples(launch: Launch) -> None:
    """They call `launch_training`, with variables for the options."""
    launch.start("finish", "finish")
    launch.end()
    script = launch.directory / "train.sh"
    script.write_text(
        f"set -euo pipefail\nsource {ROOT}/examples/launch/launch.sh\n"
        "PROJECT=x\nNPROC_PER_NODE=3\nHOSTFILE=\nrequire_settings PROJECT\nreport_problems\n"
        'launch_training --save_dir "my runs" --host-a finish --host-b finish\n'
    )
    result = subprocess.run(
        ["bash", "train.sh"],
        cwd=launch.directory,
        env={"PATH": f"{launch.directory}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    words = read_json(launch.directory / "words.json")
    assert words[:4] == ["run", "--nproc_per_node", "3", "--master_port"]
    assert words[5:] == ["train.py", "--save_dir", "'my runs'", *["--host-a", "finish", "--host-b", "finish"]]


def test_hosts_are_those_of_the_hostfile_that_was_read(launch: Launch) -> None:
    """`colossalai run` would take the byte order mark for a part of the first name."""
    (launch.directory / "hosts").write_bytes("\ufeffhost-a\r\n\nhost-b\n".encode())
    launch.start("finish", "finish", options="--hostfile hosts")
    assert launch.end() == 0
    words = read_json(launch.directory / "words.json")
    assert words[5:8] == ["--host", "host-a,host-b", "train.py"]
    assert words[3:5] == ["--master_port", "29500"]


def test_grace_periods() -> None:
    assert GracePeriods.from_environment({"FAILURE_GRACE_SECONDS": ""}) == GracePeriods(60, 45)
    assert GracePeriods.from_environment({"STOP_GRACE_SECONDS": "2.5"}) == GracePeriods(60, 2.5)
    with pytest.raises(UserError):
        GracePeriods.from_environment({"STOP_GRACE_SECONDS": "inf"})


def test_the_newest_checkpoint_is_the_complete_one_with_the_highest_step(tmp_path: Path) -> None:
    save_dir = tmp_path / "runs [1]"
    assert newest_checkpoint(str(save_dir)) is None
    for name in ("epoch-0_step-9", "epoch-1_step-10", "epoch-1_step-x", ".epoch-1_step-12.unfinished"):
        (save_dir / name).mkdir(parents=True)
        (save_dir / name / "COMPLETE").touch()
    (save_dir / "epoch-1_step-11").mkdir()
    assert newest_checkpoint(str(save_dir)) == f"{save_dir}/epoch-1_step-10"


def test_it_starts_without_the_libraries_of_training() -> None:
    script = (
        "import sys, colossal_llama.launch.__main__ as m; print({'torch', 'colossalai'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
