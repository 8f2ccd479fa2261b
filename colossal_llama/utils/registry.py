"""Registries of names: what can be chosen is listed without being imported."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def look_up(registry: Mapping[str, str], name: str) -> Any:
    """The class or function of a registry whose values are `module:name`."""
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
