"""Which kernels are used, and what the first log lines say of those that are not."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plugin_cases import make_config, plugin_of
from stand_ins.flash import flash_attn_stand_in, torch_flash_stand_in

from colossal_llama.training.llama import flash, loss
from colossal_llama.training.plugins.base import Plugin
from colossal_llama.training.reporting.kernels import describe_kernels, kernel_warnings


@pytest.fixture(autouse=True)
def no_earlier_answer():
    yield
    flash.find_flash_kernel.cache_clear()
    loss.why_no_liger.cache_clear()
    loss.liger_kernel.cache_clear()


def plugin_on_gpu(
    flags: str, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)
) -> Plugin:
    """Of a model with grouped queries, on a CPU that answers for a GPU."""
    flash.find_flash_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(Plugin, "on_gpu", property(lambda self: True))
    plugin = plugin_of(flags)
    plugin.device, plugin.tensor_group = torch.device("cpu"), None
    plugin.choose_attention(make_config())
    return plugin


def test_flash_attn_comes_first(monkeypatch):
    with flash_attn_stand_in(), torch_flash_stand_in():
        plugin = plugin_on_gpu("--plugin ddp --use_flash_attn", monkeypatch)
        assert "attention: flash-attn;" in describe_kernels(plugin)
        assert kernel_warnings(plugin) == []


def test_torchs_kernel_comes_second(monkeypatch):
    with torch_flash_stand_in():
        plugin = plugin_on_gpu("--plugin zero2 --use_flash_attn", monkeypatch)
        assert "attention: flash attention by torch's " in describe_kernels(plugin)
        (warning,) = kernel_warnings(plugin)
        assert "is used (flash-attn: No module named 'flash_attn')" in warning


def test_what_is_said_where_none_runs(monkeypatch):
    plugin = plugin_on_gpu("--plugin zero2 --use_flash_attn", monkeypatch)
    assert plugin.flash is None
    assert "attention: torch scaled dot-product" in describe_kernels(plugin)
    (warning,) = kernel_warnings(plugin)
    assert "no such kernel runs here (flash-attn: " in warning
    assert "; torch's own: " in warning


@pytest.mark.parametrize(
    ("flags", "capability"),
    [
        ("--plugin zero2", (9, 0)),  # not asked for
        ("--plugin zero2 --use_flash_attn --mixed_precision fp32", (9, 0)),
        ("--plugin zero2 --use_flash_attn", (7, 5)),  # the plan warns
    ],
)
def test_where_flash_attention_is_not_looked_for(flags, capability, monkeypatch):
    with flash_attn_stand_in() as calls:
        plugin = plugin_on_gpu(flags, monkeypatch, capability)
        assert plugin.flash is None
        assert calls.forwards == 0
        assert kernel_warnings(plugin) == []


def test_a_kernel_is_tried_with_the_heads_of_a_process(monkeypatch):
    with flash_attn_stand_in() as calls:
        plugin_on_gpu("--plugin 3d --tp 2 --use_flash_attn", monkeypatch)
        assert calls.heads == {(4, 2)}


def say_version(found: str, monkeypatch: pytest.MonkeyPatch) -> str | None:
    loss.why_no_liger.cache_clear()
    monkeypatch.setattr(loss, "version", lambda package: found)
    return loss.why_no_liger()


def test_only_tested_versions_of_liger_are_used(monkeypatch):
    for newer in ("0.6.3", "0.8.5"):
        assert say_version(newer, monkeypatch) == f"{newer} found, not used: tested is 0.5.10"
        assert loss.liger_kernel() is None
        loss.liger_kernel.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert say_version("0.5.10", monkeypatch) is None


def test_liger_needs_a_c_compiler(monkeypatch):
    """Triton compiles a launcher for each kernel when that is first called."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "Triton needs a C compiler" in say_version("0.5.10", monkeypatch)
    monkeypatch.setenv("CC", "/usr/bin/cc")
    monkeypatch.setattr(loss.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Triton needs Python.h" in say_version("0.5.10", monkeypatch)


def kernel_arguments(source: str) -> set[str]:
    """Of `liger_cross_entropy_kernel`, read without importing Triton."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name == "liger_cross_entropy_kernel":
            return {argument.arg for argument in node.args.args}
    raise AssertionError("no such kernel")


def test_the_tested_version_takes_what_the_loss_passes():
    """0.6.3 has `HAS_GRADIENTS` besides, and the call would fail in the first step."""
    passed: dict[str, object] = {}

    launch = {(3,): lambda **arguments: passed.update(arguments)}
    module = SimpleNamespace(MAX_FUSED_SIZE=65536, liger_cross_entropy_kernel=launch)
    loss._fused_cross_entropy(module, torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))
    found = importlib.util.find_spec("liger_kernel")
    if found is None:
        pytest.skip("liger-kernel is not installed")
    source = Path(found.submodule_search_locations[0]) / "ops" / "cross_entropy.py"
    assert kernel_arguments(source.read_text(encoding="utf-8")) == passed.keys() - {"num_warps"}
