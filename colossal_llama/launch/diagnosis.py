"""What the pre-flight check makes of the hosts' answers: problems, warnings, and the table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from colossal_llama.launch import probe
from colossal_llama.launch.settings import HostSettings
from colossal_llama.launch.ssh_probe import Answer, Directories
from colossal_llama.utils.console import format_table

GPU_IN_USE = 0.1
MISSING = "-"


def find_problems(answers: list[Answer], settings: HostSettings, directories: Directories) -> list[str]:
    """Everything that would keep training from starting, host by host."""
    problems = [answer.problem for answer in answers if answer.problem is not None]
    reached = [answer for answer in answers if answer.facts is not None]
    if not reached:
        return problems
    reference = reached[0]
    for answer in reached:
        if "workdir" in answer.facts:
            problems.append(
                f"{answer.host}: {os.getcwd()}: {answer.facts['workdir']}; every host needs the project at "
                "this path"
            )
            continue
        problems += _version_problems(answer, reference)
        problems += _path_problems(answer, reference, directories)
        problems += _network_problems(answer, answers[0], settings, len(answers))
        problems += _gpu_problems(answer, reached, settings)
    return problems


def _version_problems(answer: Answer, reference: Answer) -> Iterator[str]:
    facts, expected = answer.facts, reference.facts
    if facts["torchrun"] is None:
        yield f"{answer.host}: no torchrun on PATH; install the project in the same environment as here"
    if facts["project"] is None:
        yield f"{answer.host}: {os.getcwd()}: no train.py there; every host needs the project at this path"
    elif facts["project"] != expected.get("project") and expected.get("project"):
        yield (
            f"{answer.host}: project {_show_project(facts)}, {reference.host} has {_show_project(expected)}; "
            "bring the sources to the same state"
        )
    if facts["python"] != expected["python"]:
        yield (
            f"{answer.host}: Python {facts['python']} ({facts['executable']}), {reference.host} has "
            f"{expected['python']}; use the same"
        )
    for package, version in facts["packages"].items():
        wanted = expected["packages"][package]
        if version is None:
            yield f"{answer.host}: {package} is not installed in {facts['executable']}'s environment"
        elif wanted is not None and version != wanted:
            yield f"{answer.host}: {package} {version}, {reference.host} has {wanted}; install the same"


def _path_problems(answer: Answer, reference: Answer, directories: Directories) -> Iterator[str]:
    for flag, path in directories.inputs:
        found, expected = answer.facts["paths"][path], reference.facts.get("paths", {}).get(path, {})
        if "missing" in found:
            yield f"{answer.host}: {flag} {path}: no such directory; mount the storage there, or copy it"
        elif "error" in found:
            yield f"{answer.host}: {flag} {found['error']}"
        elif "fingerprint" in expected and found != expected:
            yield (
                f"{answer.host}: {flag} {path}: holds something else than on {reference.host} "
                f"({found['files']:,} files, fingerprint {found['fingerprint']}, against "
                f"{expected['files']:,}, {expected['fingerprint']}); copy it again"
            )
    if answer.facts.get("shared") is False:
        yield (
            f"{answer.host}: --save_dir {directories.save_dir}: a file written here is not seen there; "
            "checkpoints need storage that all hosts share"
        )
    elif answer.facts.get("writable") is False:
        yield f"{answer.host}: --save_dir {directories.save_dir}: can't be written there"


def _network_problems(answer: Answer, first: Answer, settings: HostSettings, num_hosts: int) -> Iterator[str]:
    facts = answer.facts
    if facts["port"] is not None:
        port = settings.master_port
        yield f"{answer.host}: port {port}: {facts['port']}; choose another with --master_port"
    if num_hosts == 1:
        return
    address = facts["first_address"]
    if address is None:
        yield f"{answer.host}: does not know the name {first.host}; add it to DNS or /etc/hosts there"
    elif answer is not first and address.startswith("127."):
        yield f"{answer.host}: takes {first.host} for itself ({address}); correct /etc/hosts there"
    elif first.facts is not None and first.facts["port"] is None and facts.get("connection"):
        yield (
            f"{answer.host}: can't reach {first.host} ({address}) at port {settings.master_port}: "
            f"{facts['connection']}; open the firewall between the hosts for all ports above 1023"
        )
    yield from _interface_problems(answer)


def _interface_problems(answer: Answer) -> Iterator[str]:
    facts = answer.facts
    names = ", ".join(facts["interfaces"])
    gloo = os.environ.get("GLOO_SOCKET_IFNAME")
    if gloo is not None and any(name not in facts["interfaces"] for name in gloo.split(",")):
        yield f"{answer.host}: GLOO_SOCKET_IFNAME={gloo}: no such interface with an address; it has {names}"
    nccl = os.environ.get("NCCL_SOCKET_IFNAME")
    if nccl is not None and not any(_nccl_takes(nccl, name) for name in facts["interfaces"]):
        yield f"{answer.host}: NCCL_SOCKET_IFNAME={nccl}: leaves no interface; it has {names}"
    # gloo listens on the address that the host's own name resolves to.
    if gloo is None and not facts["gpus"]:
        own = facts["own_address"]
        if own is None or own.startswith("127.") or own == "::1":
            yield (
                f"{answer.host}: its name {facts['hostname']} resolves to {own or 'no address'}, where other "
                f"hosts can't reach it; set GLOO_SOCKET_IFNAME to one of {names}, or correct /etc/hosts there"
            )


def _nccl_takes(setting: str, name: str) -> bool:
    """NCCL's rule: prefixes, exact names after `=`, and all others after `^`."""
    excludes, exact = setting.startswith("^"), setting.lstrip("^").startswith("=")
    words = setting.lstrip("^=").split(",")
    matches = any(name == word if exact else name.startswith(word) for word in words)
    return matches != excludes


def _gpu_problems(answer: Answer, reached: list[Answer], settings: HostSettings) -> Iterator[str]:
    gpus = answer.facts["gpus"]
    if isinstance(gpus, str):
        yield f"{answer.host}: its GPUs can't be used: {gpus}"
        return
    if not any(isinstance(other.facts["gpus"], str) or other.facts["gpus"] for other in reached):
        return
    usable = _usable_gpus(gpus)
    if settings.nproc_per_node is not None and usable < settings.nproc_per_node:
        yield (
            f"{answer.host}: {usable} GPUs for --nproc_per_node {settings.nproc_per_node}; start fewer "
            "processes, or leave the host out"
        )


def _usable_gpus(gpus: list[dict[str, Any]]) -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(gpus) if not visible else min(len(gpus), len(visible.split(",")))


def find_warnings(answers: list[Answer]) -> Iterator[str]:
    """What may be intended, but should be looked at."""
    visible = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    kinds = set()
    for answer in answers:
        if answer.facts is None:
            continue
        if answer.facts["pkill"] is None:
            yield f"{answer.host}: no pkill there, which passes SIGTERM and Ctrl-C on; install procps"
        gpus = answer.facts["gpus"]
        for index, gpu in enumerate(() if isinstance(gpus, str) else gpus):
            kinds.add(gpu["name"])
            if gpu["used"] > GPU_IN_USE * gpu["total"] and (not visible or str(index) in visible):
                yield (
                    f"{answer.host}: GPU {index} has {gpu['used'] / 1024:.1f} of "
                    f"{gpu['total'] / 1024:.1f} GiB in use"
                )
    if len(kinds) > 1:
        yield f"different GPUs ({', '.join(sorted(kinds))}): each step waits for the slowest"


def format_answers(answers: list[Answer], directories: Directories) -> str:
    """The table, with one line per host."""
    header = (
        "host",
        "ssh",
        "Python",
        *probe.PACKAGES[:2],
        "project",
        "inputs",
        "save_dir",
        "interface",
        "GPUs, free memory",
    )
    return format_table(header, [_row(answer, answers[0], directories) for answer in answers])


def _row(answer: Answer, first: Answer, directories: Directories) -> list[str]:
    facts = answer.facts
    if facts is None:
        return [answer.host, "failed", *[MISSING] * 8]
    paths = facts.get("paths", {})
    expected = (first.facts or {}).get("paths", {})
    same = sum("fingerprint" in found and found == expected.get(path, found) for path, found in paths.items())
    return [
        answer.host,
        "ok",
        facts["python"],
        *(facts["packages"][package] or "missing" for package in probe.PACKAGES[:2]),
        _show_project(facts),
        f"{same} of {len(paths)}" if directories.inputs else MISSING,
        {True: "shared", False: "not shared", None: MISSING}[facts.get("shared")],
        _show_interface(facts),
        _show_gpus(facts["gpus"]),
    ]


def _show_project(facts: dict[str, Any]) -> str:
    project = facts.get("project")
    return "missing" if not project else f"{project['version']} ({project['sources'][:7]})"


def _show_interface(facts: dict[str, Any]) -> str:
    address = facts.get("source_address")
    if address is None:
        return MISSING
    name = next((name for name, own in facts["interfaces"].items() if own == address), "?")
    return f"{name} {address}"


def _show_gpus(gpus: list[dict[str, Any]] | str) -> str:
    if isinstance(gpus, str):
        return "failed"
    if not gpus:
        return "none"
    free = min(gpu["total"] - gpu["used"] for gpu in gpus) / 1024
    counts = Counter(gpu["name"] for gpu in gpus)
    names = " + ".join(f"{count} x {name}" for name, count in counts.items())
    return f"{names}, {free:.0f} GiB"
