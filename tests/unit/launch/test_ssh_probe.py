"""Probing hosts, where that can't even begin."""

from __future__ import annotations

import pytest

from colossal_llama.launch.settings import HostSettings
from colossal_llama.launch.ssh_probe import Directories, SshProbe
from colossal_llama.utils.errors import UserError


def test_a_machine_without_ssh_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    settings = HostSettings(hostfile=tmp_path / "hostfile")
    with pytest.raises(UserError, match="ssh: not on PATH"):
        SshProbe(settings, ["host-a", "host-b"], Directories()).probe_all(None)
