"""What keeps a plugin from training on this machine."""

from __future__ import annotations

import pytest
import torch
from plugin_cases import model_problems as problems

from colossal_llama.training.plugins import base


def test_gemini_needs_a_gpu_but_can_be_planned_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (problem,) = problems("--plugin gemini_auto", 2)
    assert problem.startswith("--plugin gemini_auto: runs on GPUs only")
    assert "use zero2, ddp or 3d on a CPU" in problem
    assert problems("--plugin gemini_auto --dry_run", 2) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert problems("--plugin gemini_auto", 2) == []


def test_flash_attention_needs_its_package_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "has_flash_attn", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert problems("--plugin ddp --use_flash_attn", 1) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (problem,) = problems("--plugin ddp --use_flash_attn", 1)
    assert problem.startswith("--use_flash_attn: ")
    assert "install it" in problem
    monkeypatch.setattr(base, "has_flash_attn", lambda: True)
    assert problems("--plugin ddp --use_flash_attn", 1) == []
