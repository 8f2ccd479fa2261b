"""Runs the probe of the pre-flight check on every host, all at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colossal_llama.launch import probe
from colossal_llama.launch.environment import environment_to_pass_on
from colossal_llama.launch.settings import HostSettings
from colossal_llama.utils.errors import UserError

# Beyond the time limit for ssh, the probe itself may take this long: fingerprints, nvidia-smi, connecting.
PROBE_SECONDS = 60
SSH_REMEDIES = {
    "Permission denied": "let this user log in with a key (ssh-copy-id)",
    "Host key verification failed": "its key is not the one in ~/.ssh/known_hosts; see ssh-keygen -R",
    "Could not resolve hostname": "correct the name in the hostfile, or make it known to this machine",
    "Connection refused": "no ssh server answers there; start it, or give --ssh_port",
    "timed out": "is it up, and is there a firewall between?",
    "No route to host": "is it up, and on this network?",
}


@dataclass
class Directories:
    """Directories of a training command.

    Attributes:
        inputs: (flag, path), to be the same on every host.
        save_dir: to be shared; None when no training command was given.
    """

    inputs: list[tuple[str, str]] = field(default_factory=list)
    save_dir: str | None = None


@dataclass
class Answer:
    """The answer of a host: facts, or the problem that kept it from answering."""

    host: str
    facts: dict[str, Any] | None = None
    problem: str | None = None


class SshProbe:
    """Runs the probe on hosts over ssh; on this machine when there is no hostfile."""

    def __init__(self, settings: HostSettings, hosts: list[str], directories: Directories) -> None:
        self.settings, self.hosts, self.directories = settings, hosts, directories
        self.environment = environment_to_pass_on(os.environ)
        self.over_ssh = settings.hostfile is not None
        self.source = Path(probe.__file__).read_text(encoding="utf-8")

    def probe_all(self, token: Path | None) -> list[Answer]:
        """All hosts at the same time; the first one listens until the others have tried to reach it."""
        if self.over_ssh and shutil.which("ssh") is None:
            raise UserError("ssh: not on PATH, and hosts are reached with it; install an OpenSSH client")
        with ThreadPoolExecutor(max_workers=len(self.hosts)) as pool:
            first = self._start(self.hosts[0], token)
            others = list(pool.map(lambda host: self._finish(host, self._start(host, token)), self.hosts[1:]))
            return [self._finish(self.hosts[0], first), *others]

    def _start(self, host: str, token: Path | None) -> subprocess.Popen:
        return subprocess.Popen(
            self._command(host, token),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )

    def _command(self, host: str, token: Path | None) -> list[str]:
        request = {
            "workdir": os.getcwd(),
            "paths": sorted({path for _, path in self.directories.inputs}),
            "token": None if token is None else str(token),
            "port": self.settings.master_port,
            "listens": host == self.hosts[0],
            "first_host": self.hosts[0] if len(self.hosts) > 1 else None,
        }
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        words = ["env", *variables, "python", "-c", self.source, json.dumps(request)]
        if not self.over_ssh:
            return words
        timeout, ssh_port = self.settings.timeout, self.settings.ssh_port
        options = ["BatchMode=yes", f"ConnectTimeout={timeout}", "StrictHostKeyChecking=accept-new"]
        port = [] if ssh_port is None else ["-p", str(ssh_port)]
        return ["ssh", *(f"-o{option}" for option in options), *port, host, shlex.join(words)]

    def _finish(self, host: str, process: subprocess.Popen) -> Answer:
        limit = self.settings.timeout + PROBE_SECONDS
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return Answer(host, problem=f"{host}: no answer within {limit} s; does `ssh {host} true` return?")
        for line in output.splitlines():
            if line.startswith(probe.MARK):
                return Answer(host, json.loads(line.removeprefix(probe.MARK)))
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit code {process.returncode}"
        if self.over_ssh and process.returncode == 255:
            remedy = next((text for words, text in SSH_REMEDIES.items() if words in errors), "")
            return Answer(host, problem=f"{host}: ssh failed ({said})" + (f"; {remedy}" if remedy else ""))
        return Answer(
            host,
            problem=f"{host}: the check can't run there ({said}); `python` has to be on the PATH of this "
            "shell, and at the same place on every host",
        )


@contextlib.contextmanager
def token_file(save_dir: str | None, is_needed: bool) -> Iterator[Path | None]:
    """A file in `save_dir` that only shared storage shows on every host.

    It is removed in the end, and so are the directories that were made for it.
    """
    if save_dir is None or not is_needed:
        yield None
        return
    directory = Path(save_dir).absolute()
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    token = directory / f".preflight-{secrets.token_hex(8)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        token.touch()
    except OSError as error:
        raise UserError(
            f"--save_dir {save_dir}: can't be written ({error.strerror}); give another one"
        ) from None
    try:
        yield token
    finally:
        token.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
