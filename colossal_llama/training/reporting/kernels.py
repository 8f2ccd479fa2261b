"""What computes: which kernels were found, and which of them are used."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from colossal_llama.training.llama.loss import liger_kernel, why_no_liger
from colossal_llama.training.plugins.base import has_apex_norm

if TYPE_CHECKING:
    from colossal_llama.training.plugins.base import Plugin


def describe_kernels(plugin: Plugin) -> str:
    """Device, plugin, precision, and which kernels compute attention and loss."""
    attention = "torch scaled dot-product" if plugin.flash is None else plugin.flash.name
    loss = "whole logits" if plugin.needs_whole_logits else "chunked cross entropy"
    may_fuse = plugin.on_gpu and not plugin.needs_whole_logits and plugin.tensor_group is None
    if may_fuse and liger_kernel() is not None:
        loss += " by liger-kernel"
    has_flash = importlib.util.find_spec("flash_attn") is not None
    found = {
        "flash-attn": "found" if has_flash else "not found",
        "apex": "found" if has_apex_norm() else "not found",
        "liger-kernel": why_no_liger() or "found",
    }
    optional = ", ".join(f"{name} {state}" for name, state in found.items())
    compiled = "decoder layers compiled at their first use; " if plugin.layout.compile else ""
    return (
        f"Device {plugin.device.type}, {plugin.name}, {plugin.layout.mixed_precision}; "
        f"attention: {attention}; loss: {loss}; {compiled}{optional}"
    )


def kernel_warnings(plugin: Plugin) -> list[str]:
    """Where another kernel than the one that was asked for computes, and why."""
    if not plugin.flash_problems:
        return []
    reasons = "; ".join(plugin.flash_problems)
    if plugin.flash is not None:
        return [f"--use_flash_attn: {plugin.flash.name} is used ({reasons})"]
    return [
        f"--use_flash_attn: no such kernel runs here ({reasons}); torch's attention computes the same, "
        "slowly where rows hold several documents"
    ]
