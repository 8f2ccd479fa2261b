"""Every registered plugin can be asked what it takes, without a process group and without colossalai."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from plugin_cases import LLAMA2_7B, make_config, model_problems, plugin_of
from support import ROOT

from colossal_llama.training.layout import LayoutSettings
from colossal_llama.training.memory import MemoryEstimate, estimate_memory
from colossal_llama.training.plugins import PLUGINS, find_plugin
from colossal_llama.training.plugins.base import Plugin
from colossal_llama.utils.settings import flags_of

EVERY_PLUGIN = pytest.mark.parametrize("name", PLUGINS)


@EVERY_PLUGIN
def test_a_plugin_is_found_by_its_name(name: str) -> None:
    plugin = find_plugin(name)
    assert issubclass(plugin, Plugin)
    assert plugin.name == name
    assert f"{plugin.__module__}:{plugin.__name__}" == PLUGINS[name]


def test_the_flag_offers_what_is_registered() -> None:
    assert flags_of([LayoutSettings()])["plugin"].choices == tuple(PLUGINS)


@EVERY_PLUGIN
def test_a_plugin_answers_without_a_process_group(name: str) -> None:
    plugin = plugin_of(f"--plugin {name} --dry_run", world_size=4)
    assert plugin.conflicts() == []
    assert plugin.model_conflicts(make_config()) == []
    assert name in plugin.describe_layout()
    states = plugin.estimate_states(plugin.count_held_parameters(LLAMA2_7B))
    assert states.keys() <= {each.name for each in fields(MemoryEstimate)}
    assert states["weights"] > 0
    assert estimate_memory(plugin, LLAMA2_7B).peak > states["weights"]
    assert all(note.endswith(".") for note in plugin.memory_notes())
    assert not dist.is_initialized()


@EVERY_PLUGIN
@pytest.mark.parametrize("has_gpu", [False, True])
def test_every_plugin_trains_on_every_machine(
    name: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert model_problems(f"--plugin {name}", 2) == []
    assert plugin_of(f"--plugin {name}", 2).doubts() == []


def test_files_of_plugins_do_not_import_colossalai() -> None:
    """Its import takes seconds, and has to wait for what `start_process` sets up."""
    script = (
        "import sys\n"
        "from colossal_llama.training.plugins import PLUGINS, find_plugin\n"
        "print([name for name in PLUGINS if find_plugin(name) and 'colossalai' in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
