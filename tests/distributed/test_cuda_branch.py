"""What plugins do on a GPU, as far as a CPU can tell: their CUDA branch, with stand-ins that refuse.

No compiler anywhere, flash attention with the kernels' own checks, streams that are recorded.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from cuda_branch_steps import CASES, NO_COMPILER
from launch import ROOT, train
from plugin_cases import make_config

PLUGIN_CASES = [name for name in CASES if name != "plain"]
FLAGS = ["--benchmark", "--max_length", 32, "--batch_size", 2, "--deterministic"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import LlamaForCausalLM

    directory = tmp_path_factory.mktemp("cuda_branch")
    torch.manual_seed(0)
    config = make_config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config.initializer_range = 0.1
    LlamaForCausalLM(config).save_pretrained(directory / "model")
    script = ROOT / "tests" / "distributed" / "cuda_branch_steps.py"
    run = train(directory, 2, "--pretrained", directory / "model", *FLAGS, script=script)
    written = directory / "outcomes.json"
    assert written.is_file(), run.output[-3000:]
    return json.loads(written.read_text(encoding="utf-8"))


def outcome_of(name: str, outcomes: dict[str, Any]) -> dict[str, Any]:
    assert name in outcomes, f"the run ended before {name}"
    outcome = outcomes[name]
    assert "error" not in outcome, outcome["error"]
    return outcome


def test_nothing_can_be_compiled_there(outcomes: dict[str, Any]) -> None:
    assert "No usable kernel found" in outcomes["compiling"] or NO_COMPILER in outcomes["compiling"]


@pytest.mark.parametrize("name", PLUGIN_CASES)
def test_a_plugin_steps_with_torchs_optimizer(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcome_of(name, outcomes)
    assert outcome["is_torchs"]
    assert outcome["fused"]


@pytest.mark.parametrize("name", PLUGIN_CASES)
def test_flash_attention_gives_the_losses_of_plain_attention(name: str, outcomes: dict[str, Any]) -> None:
    outcome, plain = outcome_of(name, outcomes), outcome_of("plain", outcomes)
    assert outcome["losses"] == pytest.approx(plain["losses"], rel=2e-3)
    assert outcome["norms"] == pytest.approx(plain["norms"], rel=2e-2)
    assert outcome["forwards"] > 4
    assert outcome["dtypes"] == ["torch.float16" if "fp16" in CASES[name][0] else "torch.bfloat16"]
    # Three in each row; padding there is none.
    assert outcome["documents"] >= 3
    wanted = (
        "attention: flash-attn" if "flash_attn" in CASES[name][1].__name__ else "flash attention by torch's"
    )
    assert wanted in outcome["kernels"]


@pytest.mark.parametrize("name", PLUGIN_CASES)
def test_deterministic_reaches_the_kernel(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcome_of(name, outcomes)
    assert outcome["deterministic"] == [True]
    assert outcome["nondeterministic"] == []


@pytest.mark.parametrize("name", PLUGIN_CASES)
def test_every_read_is_ordered(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcome_of(name, outcomes)
    assert outcome["races"] == []
    overlaps = "zero2" in name or name in ("3d, zero 1", "3d, zero 2", "3d, offload", "tp 2")
    if overlaps:
        assert outcome["streams"] == 2, "the reduction has no stream of its own: nothing was checked"


def test_the_plain_run_had_no_kernel(outcomes: dict[str, Any]) -> None:
    outcome = outcome_of("plain", outcomes)
    assert "attention: torch scaled dot-product" in outcome["kernels"]
    assert outcome["problems"] == []
