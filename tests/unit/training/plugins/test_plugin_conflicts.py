"""What keeps a plugin from training on this machine."""

from __future__ import annotations

import pytest
import torch
from plugin_cases import make_config, plugin_of
from plugin_cases import model_problems as problems

from colossal_llama.training.memory import activation_bytes_per_token
from colossal_llama.upstream.packed_attention import find_packed_attention


def test_gemini_needs_a_gpu_but_can_be_planned_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = problems("--plugin gemini_auto", 2)
    assert problem.startswith("--plugin gemini_auto: runs on GPUs only")
    assert "use zero2, ddp or 3d on a CPU" in problem
    assert problems("--plugin gemini_auto --dry_run", 2) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert problems("--plugin gemini_auto", 2) == []


def test_flash_attention_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flash-attn, torch's own kernel computes."""
    for has_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert problems("--plugin ddp --use_flash_attn", 1) == []


@pytest.mark.parametrize(
    ("capability", "flags", "expected"),
    [
        ((7, 5), "--mixed_precision bf16", ["--mixed_precision bf16: this GPU has compute capability 7.5"]),
        ((7, 5), "--mixed_precision fp16", []),
        ((7, 5), "--use_flash_attn", ["--use_flash_attn: this GPU has compute capability 7.5"]),
        ((8, 0), "--mixed_precision bf16 --use_flash_attn", []),
        ((12, 0), "--mixed_precision bf16 --use_flash_attn", []),
    ],
)
def test_what_a_gpu_does_slowly(capability, flags, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    plugin = plugin_of(f"--plugin zero2 {flags}")
    doubts = plugin.gpu_doubts(make_config())
    assert len(doubts) == len(expected)
    assert all(doubt.startswith(start) for doubt, start in zip(doubts, expected, strict=True))
    # The plan counts the mask where there will be one.
    assert plugin.expects_flash(make_config()) == ("flash" in flags and capability >= (8, 0))


def test_torchs_kernel_repeats_keys_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(num_key_value_heads=1)
    flags = "--plugin zero2 --use_flash_attn"
    without_gpu = activation_bytes_per_token(plugin_of(flags), config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert find_packed_attention().repeats_keys
    with_gpu = activation_bytes_per_token(plugin_of(flags), config)
    # Seven more heads of keys and of values, two bytes each.
    assert with_gpu - without_gpu == 2 * 7 * 8 * 2
