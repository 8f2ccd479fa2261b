"""Asking hosts, where that can't even begin."""

from __future__ import annotations

import pytest

from colossal_llama.launch.asking import Asker, Directories
from colossal_llama.launch.preflight import build_parser
from colossal_llama.utils.errors import UserError


def test_a_machine_without_ssh_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    args = build_parser().parse_args(["--hostfile", str(tmp_path / "hostfile")])
    with pytest.raises(UserError, match="ssh: not on PATH"):
        Asker(args, ["host-a", "host-b"], Directories()).ask_all(None)
