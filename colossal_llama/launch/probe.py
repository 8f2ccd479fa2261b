"""Examines one host for the pre-flight check, and prints what it finds as one line of JSON.

The check sends this file's source to each host, so it needs nothing but Python's standard library there. Its
only argument is a JSON object: `workdir`; `paths`, directories to fingerprint; `token`, a file that shared
storage shows on every host, or null; `port`, to be free and listened on by the first host, where `listens` is
true; `first_host`, to be reached by the others at that port, or null where there is one host.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import select
import shutil
import socket
import struct
import subprocess
import sys
import time

MARK = "colossal_llama probe: "
PACKAGES = ("torch", "colossalai", "transformers", "datasets")
SOURCES = ("train.py", "colossal_llama/**/*.py")
CONNECT_SECONDS = 10.0
# The others connect while the first host listens, at most this long.
LISTEN_SECONDS = 90.0
JSON_BYTES = 1 << 20


def versions() -> dict[str, str | None]:
    """Installed versions; None for what is missing."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def hash_files(paths: list[str], top: str) -> str:
    """A fingerprint of file names and contents."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(os.path.relpath(path, top).encode() + b"\0")
        with open(path, "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()[:12]


def project() -> dict | None:
    """Version and fingerprint of the sources that `train.py` in the current directory would run."""
    if not os.path.isfile("train.py"):
        return None
    version = None
    with contextlib.suppress(OSError), open("version.txt", encoding="utf-8") as file:
        version = file.read().strip()
    files = [path for pattern in SOURCES for path in glob.glob(pattern, recursive=True)]
    return {"version": version, "sources": hash_files(files, ".")}


def fingerprint(directory: str) -> dict:
    """Names and sizes of all files, contents of the small JSON ones, and the statistics of prepared data."""
    digest = hashlib.sha256()
    names = []
    for folder, folders, files in os.walk(directory, followlinks=True):
        folders.sort()
        names += [os.path.join(folder, name) for name in files]
    for path in sorted(names):
        size = os.path.getsize(path)
        digest.update(f"{os.path.relpath(path, directory)} {size}\0".encode())
        if path.endswith(".json") and size <= JSON_BYTES:
            with open(path, "rb") as file:
                digest.update(file.read())
    for above in ("..", "../.."):
        statistics = os.path.join(directory, above, "stats.json")
        if os.path.isfile(statistics):
            with open(statistics, "rb") as file:
                digest.update(file.read())
            break
    return {"fingerprint": digest.hexdigest()[:12], "files": len(names)}


def look_at_path(path: str) -> dict:
    try:
        if not os.path.isdir(path):
            return {"missing": True}
        return fingerprint(path)
    except OSError as error:
        return {"error": f"{error.filename or path}: {error.strerror}"}


def interfaces() -> dict[str, str]:
    """Name -> IPv4 address of every interface that is up and has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = array.array("B", struct.pack("256s", name.encode()[:15]))
            with contextlib.suppress(OSError):
                flags = fcntl.ioctl(any_socket, 0x8913, bytes(request))  # SIOCGIFFLAGS
                answer = fcntl.ioctl(any_socket, 0x8915, bytes(request))  # SIOCGIFADDR
                if struct.unpack("16xH", flags[:18])[0] & 1:
                    found[name] = socket.inet_ntoa(answer[20:24])
    return found


def resolve(name: str) -> str | None:
    try:
        return socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        return None


def source_address(target: str) -> str | None:
    """The address of this host that packets to `target` carry."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as route:
        try:
            route.connect((target, 9))
            return route.getsockname()[0]
        except OSError:
            return None


def gpus() -> list[dict] | str:
    """Name, total and used MiB of each GPU; empty without nvidia-smi, a message when it fails."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=40)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        return lines[-1] if lines else f"nvidia-smi ends with code {done.returncode}"
    rows = []
    for line in done.stdout.splitlines():
        name, total, used = line.rsplit(",", 2)
        rows.append({"name": name.strip(), "total": int(float(total)), "used": int(float(used))})
    return rows


def listen(port: int) -> tuple[socket.socket | None, str | None]:
    """A socket that holds `port` on all addresses, or the reason why there is none."""
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("", port))
        server.listen(1024)
    except OSError as error:
        server.close()
        return None, error.strerror
    return server, None


def connect(address: str, port: int) -> str | None:
    """None when the first host answers at its port; the reason when it does not."""
    deadline = time.monotonic() + CONNECT_SECONDS
    reason = None
    while time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())).close()
            return None
        except TimeoutError:
            return f"no answer within {CONNECT_SECONDS:.0f} s"
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(0.2)
    return reason


def probe(request: dict) -> dict:
    facts = {
        "hostname": socket.gethostname(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "torchrun": shutil.which("torchrun"),
        "pkill": shutil.which("pkill"),
        "packages": versions(),
        "gpus": gpus(),
        "interfaces": interfaces(),
        "own_address": resolve(socket.gethostname()),
    }
    try:
        os.chdir(request["workdir"])
    except OSError as error:
        facts["workdir"] = error.strerror
        return facts
    facts["project"] = project()
    facts["paths"] = {path: look_at_path(path) for path in request["paths"]}
    if request["token"]:
        facts["shared"] = os.path.exists(request["token"])
        facts["writable"] = os.access(os.path.dirname(request["token"]), os.W_OK | os.X_OK)
    return facts


def main() -> None:
    request = json.loads(sys.argv[1])
    server = problem = None
    if request["listens"]:
        server, problem = listen(request["port"])
    facts = probe(request)
    facts["port"] = problem
    if request["first_host"]:
        address = facts["first_address"] = resolve(request["first_host"])
        facts["source_address"] = source_address(address) if address else None
        if not request["listens"] and address:
            facts["connection"] = connect(address, request["port"])
    print(MARK + json.dumps(facts), flush=True)
    if server is not None and request["first_host"]:
        # The reader closes this end when all others have answered.
        select.select([sys.stdin], [], [], LISTEN_SECONDS)


if __name__ == "__main__":
    main()
