"""Hostfiles: what `colossalai run` takes, and what it would stumble over."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ROOT

from colossal_llama.launch.hostfile import read_hostfile
from colossal_llama.utils.errors import UserError


def read(directory: Path, text: str) -> tuple[list[str], list[str]]:
    path = directory / "hostfile"
    path.write_bytes(text.encode())
    return read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a\nb\n", ["a", "b"]),
        ("\n  gpu-1.example.org  \n\n\t10.0.0.7\r\nfe80::1", ["gpu-1.example.org", "10.0.0.7", "fe80::1"]),
    ],
)
def test_names_and_addresses_in_order(text: str, hosts: list[str], tmp_path: Path) -> None:
    assert read(tmp_path, text) == (hosts, [])


def test_each_problem_has_its_line_and_the_other_hosts_are_kept(tmp_path: Path) -> None:
    hosts, problems = read(tmp_path, "# ours\na\na slots=8\n\nme@b\na\nc,d\n-x\ne\n")
    assert hosts == ["a", "e"]
    assert [problem.partition("hostfile")[2] for problem in problems] == [
        ':1: "# ours": `colossalai run` takes comments for host names; '
        "give one host name or address per line",
        ':3: "a slots=8": no slots or options; give one host name or address per line',
        ':5: "me@b": no user name here; set it in ~/.ssh/config, and give one host name or address per line',
        ":6: a: listed twice, first in line 2; remove one",
        ':7: "c,d": is not a host name; give one host name or address per line',
        ':8: "-x": is not a host name; give one host name or address per line',
    ]


@pytest.mark.parametrize(
    ("line", "host"),
    [("gpu-1:22", "gpu-1"), ("10.0.0.7:2222", "10.0.0.7"), ("[fe80::1]:22", "fe80::1"), ("a:", "a")],
)
def test_a_port_is_named_with_what_to_write(line: str, host: str, tmp_path: Path) -> None:
    hosts, problems = read(tmp_path, f"b\n{line}\n")
    assert hosts == ["b"]
    (problem,) = problems
    assert f':2: "{line}": no port here; write {host}, and set the port as SSH_PORT' in problem


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_hostfile(tmp_path / "hostfile") == (["a", "b"], [])


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_a_hostfile_without_hosts(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no host in it; list one per line"):
        read(tmp_path, text)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; cp hostfile\.example "):
        read_hostfile(tmp_path / "none")


def test_the_example_is_a_hostfile() -> None:
    hosts, problems = read_hostfile(ROOT / "hostfile.example")
    assert len(hosts) == 4
    assert problems == []
