"""Two hosts on one machine: network, process, mount and name namespaces of their own, each with an sshd.

They share files (as a cluster shares storage) but for `~/.ssh`, `/etc/hosts` and `/run`, and reach each
other over `eth0` alone. What runs on one sees no process of the other; powering a host off kills all that
runs there.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import ROOT

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMESPACES = ("--net", "--mount", "--pid", "--uts")
# The first process of a host adopts and reaps whatever loses its parent there.
FIRST_PROCESS = """
set -e
hostname "$NAME"
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$DIRECTORY/ssh" "$SSH_HOME"
mount --bind "$DIRECTORY/hosts" /etc/hosts
touch "$DIRECTORY/$NAME.ready"
set +e
while :; do sleep 1 & wait; done
"""
SSHD_CONFIG = """
Port 22
HostKey {host_key}
AuthorizedKeysFile {directory}/ssh/authorized_keys
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
"""


@dataclass
class Host:
    """A host that runs; `first_pid` is its first process as this machine numbers it."""

    name: str
    address: str
    directory: Path
    unshare: subprocess.Popen
    first_pid: int

    def command(self, words: Sequence[object], cwd: Path = ROOT) -> list[str]:
        """`words` as a command that runs on the host."""
        enter = ["nsenter", "--target", str(self.first_pid), *NAMESPACES, "--"]
        return [
            *enter,
            *("bash", "-c", 'cd -- "$1" && shift && exec "$@"', "bash", str(cwd)),
            *map(str, words),
        ]

    def run(self, *words: object, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
        options = {"env": host_environment(), "capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run(self.command(words, cwd), check=False, **options)

    def start(self, *words: object, output: Path, cwd: Path = ROOT, **options) -> subprocess.Popen:
        with open(output, "a", encoding="utf-8") as file:
            return subprocess.Popen(
                self.command(words, cwd),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                **{"env": host_environment(), "start_new_session": True, **options},
            )

    def start_sshd(self) -> None:
        started = self.run("/usr/sbin/sshd", "-f", self.directory / f"{self.name}.sshd_config")
        assert started.returncode == 0, started.stderr

    def stop_sshd(self) -> None:
        """No new connections; those that exist live on."""
        stopped = self.run("bash", "-c", "kill $(cat /run/sshd.pid)")
        assert stopped.returncode == 0, stopped.stderr

    def pids(self, *words: str) -> list[int]:
        """Processes of the host whose command line holds all `words`, as this machine numbers them."""
        found: list[int] = []
        try:
            namespace = os.readlink(f"/proc/{self.first_pid}/ns/pid")
        except FileNotFoundError:  # powered off
            return found
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if os.readlink(process / "ns/pid") == namespace and all(word in line for word in words):
                    found.append(int(process.name))
        return sorted(found)

    def training_pids(self) -> list[int]:
        """The `train.py` processes themselves, without launchers and shells."""
        return [
            pid
            for pid in self.pids("train.py")
            if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2][-8:]
        ]

    def cut_off(self) -> None:
        """Takes the network cable out."""
        cut = self.run("ip", "link", "set", "eth0", "down")
        assert cut.returncode == 0, cut.stderr

    def power_off(self) -> None:
        """Ends every process of the host at once; peers hear nothing of it."""
        if self.unshare.poll() is None:
            self.cut_off()
        self.kill()

    def kill(self) -> None:
        self.unshare.kill()
        self.unshare.wait()


def host_environment() -> dict[str, str]:
    """What a shell on the head node has: this environment's commands first, one thread a process."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": pwd.getpwuid(os.getuid()).pw_dir,
        "LC_ALL": "C.UTF-8",
    }


def why_not() -> str | None:
    """What keeps this machine from having the hosts; None when nothing does."""
    if os.getuid() != 0:
        return "network namespaces and sshd need root"
    for command in ("unshare", "nsenter", "ip", "ssh-keygen", "/usr/sbin/sshd"):
        if shutil.which(command) is None:
            return f"{command} is not installed"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return None if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def _boot(name: str, address: str, directory: Path, ssh_home: Path) -> Host:
    key = directory / f"{name}.key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    (directory / f"{name}.sshd_config").write_text(SSHD_CONFIG.format(host_key=key, directory=directory))
    unshare = subprocess.Popen(
        ["unshare", *NAMESPACES, "--fork", "--mount-proc", "--kill-child", "bash", "-c", FIRST_PROCESS],
        env={**os.environ, "NAME": name, "DIRECTORY": str(directory), "SSH_HOME": str(ssh_home)},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while not (directory / f"{name}.ready").exists():
        assert unshare.poll() is None, f"{name} did not start"
        assert time.monotonic() < deadline, f"{name} did not start in time"
        time.sleep(0.02)
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()
    return Host(name, address, directory, unshare, int(children[0]))


def _connect(hosts: Sequence[Host]) -> None:
    one, two = hosts
    subprocess.run(
        [
            *("ip", "link", "add", "name", "eth0", "netns", str(one.first_pid), "type", "veth"),
            *("peer", "name", "eth0", "netns", str(two.first_pid)),
        ],
        check=True,
    )
    for host in hosts:
        for words in (f"address add {host.address}/24 dev eth0", "link set eth0 up"):
            done = host.run("ip", *words.split())
            assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def two_hosts(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Boots host-a and host-b, each reachable from both by `ssh NAME`; ends all that runs on them."""
    ssh_home = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh"
    ssh_home.mkdir(mode=0o700, exist_ok=True)  # only a place to mount on
    ssh = directory / "ssh"
    ssh.mkdir(mode=0o700)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / "id_ed25519")], check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    lines = ["127.0.0.1 localhost", *(f"{a} {n}" for a, n in zip(ADDRESSES, NAMES, strict=True))]
    (directory / "hosts").write_text("\n".join(lines) + "\n")
    hosts: list[Host] = []
    try:
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            hosts.append(_boot(name, address, directory, ssh_home))
        _connect(hosts)
        for host in hosts:
            host.start_sshd()
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()


@pytest.fixture
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """(host-a, host-b)"""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair
