"""The plugins of `--plugin`, one class in one file each.

A new one is a class that derives from `Plugin` (`base.py`) in a file of its own, and a line here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.utils.registry import look_up

if TYPE_CHECKING:
    from colossal_llama.training.plugins.base import Plugin

# Name -> module and class. Names alone, since the classes import torch and `--help` must not.
PLUGINS = {
    "ddp": "colossal_llama.training.plugins.ddp:DdpPlugin",
    "gemini": "colossal_llama.training.plugins.gemini:GeminiPlugin",
    "gemini_auto": "colossal_llama.training.plugins.gemini:GeminiAutoPlugin",
    "zero2": "colossal_llama.training.plugins.zero:Zero2Plugin",
    "zero2_cpu": "colossal_llama.training.plugins.zero:Zero2CpuPlugin",
    "3d": "colossal_llama.training.plugins.hybrid:HybridPlugin",
}


def find_plugin(name: str) -> type[Plugin]:
    """The class of a plugin."""
    return look_up(PLUGINS, name)
