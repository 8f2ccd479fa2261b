"""Hostfiles of `colossalai run`: one host name or address per line, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from colossal_llama.utils.errors import UserError

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?")
# A port after a name, an IPv4 address or a bracketed IPv6 one; an IPv6 address alone has several colons.
_PORT = re.compile(r"(?:(?P<host>[^\s:\[\]]+)|\[(?P<bracketed>[^\s\[\]]+)\]):\d*")


def read_hostfile(path: Path) -> tuple[list[str], list[str]]:
    """Hosts in the file's order, the first one being the master; and what is wrong with the file.

    Returns:
        (hosts, problems): a problem is what `colossalai run` would stumble over, with its line: comments,
        slots, user names, ports, hosts listed twice. Blank lines are fine.

    Raises:
        UserError: the file can't be read, or holds no host at all.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "can't be read as a text file"
        raise UserError(f"{path}: {reason}; cp hostfile.example {path} and list your hosts there") from None
    lines: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name:
            continue
        if not _HOST.fullmatch(name) or _PORT.fullmatch(name):
            problems.append(f'{path}:{number}: "{name}": {_complaint(name)}')
        elif name in lines:
            problems.append(f"{path}:{number}: {name}: listed twice, first in line {lines[name]}; remove one")
        else:
            lines[name] = number
    if not lines:
        raise UserError([*problems, f"{path}: no host in it; list one per line"])
    return list(lines), problems


def _complaint(name: str) -> str:
    rule = "give one host name or address per line"
    if "#" in name:
        return f"`colossalai run` takes comments for host names; {rule}"
    if "@" in name:
        return f"no user name here; set it in ~/.ssh/config, and {rule}"
    if len(name.split()) > 1:
        return f"no slots or options; {rule}"
    if found := _PORT.fullmatch(name):
        host = found["host"] or found["bracketed"]
        return f"no port here; write {host}, and set the port as SSH_PORT in the script or in ~/.ssh/config"
    return f"is not a host name; {rule}"
