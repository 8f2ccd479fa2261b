"""The `colossalai run … train.py …` of a launch script, and what is chosen for its empty options."""

from __future__ import annotations

import argparse
import re
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from colossal_llama.launch.gpus import least_used, list_gpus
from colossal_llama.launch.messages import say
from colossal_llama.launch.settings import DEFAULT_MASTER_PORT
from colossal_llama.training.settings import OutputSettings
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.errors import UserError

LAUNCHER = ("colossalai", "run")
SCRIPT = "train.py"  # the run's processes are found by it, see host_processes.py
CPU_PROCESSES = 2


@dataclass(frozen=True)
class LaunchCommand:
    """`colossalai run` with these options. Values are as they were written: the pre-flight check judges them.

    Attributes:
        num_processes: on each host.
        hostfile: None for this machine alone.
        ssh_port: None for the port that ssh is configured for.
        training: the script and its arguments.
    """

    num_processes: int
    master_port: str
    hostfile: str | None
    ssh_port: str | None
    training: tuple[str, ...]

    def preflight_words(self) -> list[str]:
        """The pre-flight check's arguments."""
        hostfile = [] if self.hostfile is None else ["--hostfile", self.hostfile]
        ssh_port = [] if self.ssh_port is None else ["--ssh_port", self.ssh_port]
        return [*self._processes(), *hostfile, *ssh_port, *self.training]

    def launcher_words(self, hosts: Sequence[str] | None) -> list[str]:
        """The command to run. It joins the arguments of training with spaces and hands them to a shell.

        Args:
            hosts: those of the hostfile. `colossalai run` would read the file for itself, and take a byte
                order mark for a part of the first name.
        """
        named = [] if hosts is None else ["--host", ",".join(hosts)]
        ssh_port = [] if self.ssh_port is None else ["--ssh-port", self.ssh_port]
        script, *arguments = self.training
        return [*LAUNCHER, *self._processes(), *named, *ssh_port, script, *map(shlex.quote, arguments)]

    def _processes(self) -> list[str]:
        return ["--nproc_per_node", str(self.num_processes), "--master_port", self.master_port]

    def save_dir(self) -> str:
        """The value of `--save_dir`, which also tells this run's processes from all others."""
        found, previous = str(OutputSettings.save_dir), ""
        for word in self.training:
            if previous == "--save_dir":
                found = word
            elif word.startswith("--save_dir="):
                found = word.removeprefix("--save_dir=")
            previous = word
        return found


def build_parser() -> ArgumentParser:
    """The options of `colossalai run` that the launch scripts set; each may be empty."""
    parser = ArgumentParser(prog="colossalai run", add_help=False)
    for option in ("--nproc_per_node", "--master_port", "--hostfile", "--ssh-port"):
        parser.add_argument(option, default="")
    parser.add_argument("training", nargs=argparse.REMAINDER)
    return parser


def read_launch_command(
    words: Sequence[str], environ: Mapping[str, str]
) -> tuple[LaunchCommand, dict[str, str]]:
    """The command that `words` describe, complete, and the variables that its processes need besides.

    Raises:
        UserError: there is no such command, or it can't be run on this machine.
    """
    if tuple(words[: len(LAUNCHER)]) != LAUNCHER:
        raise UserError(f"{shlex.join(words)}: expected `colossalai run [OPTION …] train.py [ARGUMENT …]`")
    args = build_parser().parse_args(words[len(LAUNCHER) :])
    if args.training[:1] != [SCRIPT]:
        raise UserError(f"{shlex.join(words)}: expected {SCRIPT} and its arguments after the options")
    num_processes, variables = choose_processes(args.nproc_per_node, bool(args.hostfile), environ)
    command = LaunchCommand(
        num_processes,
        args.master_port or (str(DEFAULT_MASTER_PORT) if args.hostfile else str(free_port())),
        args.hostfile or None,
        args.ssh_port or None,
        tuple(args.training),
    )
    return command, variables


def choose_processes(
    requested: str, has_hostfile: bool, environ: Mapping[str, str]
) -> tuple[int, dict[str, str]]:
    """Processes on each host, and variables that fit them: threads on a CPU, the GPUs with the most room."""
    gpus = list_gpus()
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    num_gpus = sum(bool(word) for word in visible.split(",")) if visible else len(gpus)
    if requested and not re.fullmatch("[1-9][0-9]*", requested):
        raise UserError(f"NPROC_PER_NODE {requested}: is not a number of processes")
    num_processes = int(requested) if requested else num_gpus or CPU_PROCESSES
    if num_gpus == 0:
        say(f"No GPU: {num_processes} processes on the CPU of each host")
        return num_processes, {"OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or "1"}
    if has_hostfile:
        return num_processes, {}  # the other hosts may be busy with other GPUs
    if num_processes > num_gpus:
        raise UserError(f"NPROC_PER_NODE {num_processes}: there are {num_gpus} GPUs here")
    if visible:
        return num_processes, {}
    chosen = ",".join(map(str, least_used(gpus, num_processes)))
    say(f"GPUs: {chosen} (the least used)")
    return num_processes, {"CUDA_VISIBLE_DEVICES": chosen}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
