"""One line on the kernels that were found and are used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from colossal_llama.training.llama.attention import has_flash_attn
from colossal_llama.training.plugins.base import has_apex_norm

if TYPE_CHECKING:
    from colossal_llama.training.plugins.base import Plugin


def describe_kernels(plugin: Plugin) -> str:
    """Device, plugin, precision, and which kernels compute attention and loss."""
    attention = "flash-attn" if plugin.use_flash else "torch scaled dot-product"
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    loss = "whole logits" if plugin.needs_whole_logits else "chunked cross entropy"
    if has_liger and plugin.on_gpu and not plugin.needs_whole_logits and plugin.tensor_group is None:
        loss += " by liger-kernel"
    found = {"flash-attn": has_flash_attn(), "apex": has_apex_norm(), "liger-kernel": has_liger}
    optional = ", ".join(f"{name} {'found' if there else 'not found'}" for name, there in found.items())
    return (
        f"Device {plugin.device.type}, {plugin.name}, {plugin.layout.mixed_precision}; "
        f"attention: {attention}; loss: {loss}; {optional}"
    )
