"""Checks the hosts and the arguments of a training command, then runs it under supervision.

    python -m colossal_llama.launch train.sh < <(printf '%s\\0' colossalai run --nproc_per_node 8 train.py …)

reads the command from standard input, each word ended by a NUL byte. That keeps it out of this process's
command line: `pkill -f train.py`, for example, is meant for the processes of training. Its argument, the name
of the launch script, is there for lists of processes. `examples/launch/launch.sh` is the shell's side.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from colossal_llama.launch.environment import environment_to_pass_on
from colossal_llama.launch.host_processes import HostProcesses
from colossal_llama.launch.hostfile import read_hostfile
from colossal_llama.launch.launch_command import LaunchCommand, read_launch_command
from colossal_llama.launch.messages import say
from colossal_llama.launch.supervisor import (
    GracePeriods,
    Supervisor,
    exit_code_of,
    handle_stop_signals,
    ignore_stop_signals,
)
from colossal_llama.utils.errors import UserError, run_command

# A check that is interrupted gets this long to remove its files.
CHECK_GRACE_SECONDS = 10


class Interrupted(BaseException):
    """A stop signal before training was started."""

    def __init__(self, received: signal.Signals) -> None:
        self.received = received


def read_words() -> list[str]:
    """The command on standard input."""
    words = os.fsdecode(sys.stdin.buffer.read()).split("\0")
    if words.pop():
        raise UserError("standard input: expected words that end with a NUL byte each")
    return words


def run_check(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs a check in the foreground, and ends with its exit code when it fails."""
    try:
        process = subprocess.Popen(words, env=environment, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not on PATH; activate the project's environment") from None
    try:
        code = process.wait()
    except Interrupted as interruption:
        if interruption.received != signal.SIGINT:  # which the terminal has sent to both
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CHECK_GRACE_SECONDS)
        process.kill()
        raise
    if code:
        sys.exit(code if code > 0 else 128 - code)


def make_environment(
    command: LaunchCommand, variables: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    """What belongs to the run; every host keeps the rest of its own."""
    environment = environment_to_pass_on({**environ, **variables})
    if command.hostfile is None:
        # Other hosts have homes of their own; ssh finds this one's keys in the password database.
        environment["HOME"] = environ.get("HOME", "/")
    if environ.get("SSH_AUTH_SOCK"):
        environment["SSH_AUTH_SOCK"] = environ["SSH_AUTH_SOCK"]
    return environment


def launch(words: Sequence[str], environ: Mapping[str, str]) -> int:
    grace = GracePeriods.from_environment(environ)
    command, variables = read_launch_command(words, environ)
    environment = make_environment(command, variables, environ)

    say("Checking the hosts")
    run_check(["python", "-m", "colossal_llama.launch.preflight", *command.preflight_words()], environment)
    hosts = None if command.hostfile is None else read_hostfile(Path(command.hostfile))[0]
    world_size = command.num_processes * (1 if hosts is None else len(hosts))
    say("Checking with train.py --dry_run")
    run_check(["python", *command.training, "--dry_run"], {**environment, "WORLD_SIZE": str(world_size)})

    launcher = command.launcher_words(hosts)
    say(f"Starting: {' '.join(launcher)}")
    processes = HostProcesses(hosts, command.ssh_port, command.save_dir())
    return Supervisor(processes, command.save_dir(), grace).run(launcher, environment)


def main() -> int:
    os.environ.pop("RANK", None)  # of a launcher around this one; errors are reported by rank 0 alone

    def interrupt(received: signal.Signals) -> None:
        raise Interrupted(received)

    handle_stop_signals(interrupt)
    try:
        return launch(read_words(), os.environ)
    except Interrupted as interruption:
        return exit_code_of(interruption.received)
    finally:
        ignore_stop_signals()


if __name__ == "__main__":
    run_command(main)
