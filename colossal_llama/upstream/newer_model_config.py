"""A configuration that transformers 5 wrote loses settings that have new names there.

Broken in: transformers 4.51.3, which passes over the names that it does not know: `rope_parameters` holds
what were `rope_theta` and `rope_scaling`, and `dtype` was `torch_dtype`.
Shows as: every position is rotated by the default base, so the model is another one, without a word.
Cure: set what the earlier names mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def earlier_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers 4 has to know of a configuration that transformers 5 wrote.

    >>> earlier_names({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"})
    {'rope_theta': 500000.0, 'rope_scaling': None, 'torch_dtype': 'bfloat16'}
    """
    names: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if "rope_theta" in rope:
            names["rope_theta"] = rope["rope_theta"]
        names["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if isinstance(config.get("dtype"), str) and config.get("torch_dtype") is None:
        names["torch_dtype"] = config["dtype"]
    return names


def adopt_earlier_names(config: PretrainedConfig) -> PretrainedConfig:
    """Sets `earlier_names` in a configuration that transformers has loaded; returns it."""
    import torch

    for name, value in earlier_names(vars(config)).items():
        setattr(config, name, getattr(torch, value) if name == "torch_dtype" else value)
    return config
