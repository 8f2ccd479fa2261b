"""What a run costs: by hand, for a 7B model on 64 GPUs and where weights are frozen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plugin_cases import LLAMA2_7B, make_config, parse, plugin_of

from colossal_llama.training.costs import CostSettings, RunCost, estimate_cost, format_cost
from colossal_llama.training.data.prepared_rows import sum_lengths
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.plan import make_plan
from colossal_llama.utils.llama_size import flops_per_token, matrix_parameters

H100 = "H100 80GB HBM3"


def cost_of(
    flags: str, num_rows: int, world_size: int = 1, length: int = 64, config: Any = LLAMA2_7B, **costs: Any
) -> tuple[RunCost, str]:
    """The cost of a run on full rows, and what is printed."""
    plugin = plugin_of(f"--max_length {length} {flags}", world_size)
    rows = RandomRows(num_rows, length, config.vocab_size, 0)
    settings = replace(plugin.settings, costs=CostSettings(**costs))
    cost = estimate_cost(make_plan(plugin, config, rows), config, sum_lengths(rows, True), settings)
    return cost, format_cost(cost, settings.costs, settings.layout.mixed_precision)


def test_7b_on_64_h100s() -> None:
    flags = "--plugin zero2 --mixed_precision bf16 --accumulation_steps 1"
    costs = {"num_rows": 64_000, "world_size": 64, "length": 4096, "device_name": H100}
    cost, text = cost_of(flags, **costs, price_per_hour=2.5)
    tokens = 64_000 * 4096
    assert cost.tokens == tokens
    wanted = 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 4096
    assert cost.flops_per_token == wanted
    assert cost.hours == pytest.approx(tokens * wanted / (64 * 0.4 * 989.4e12) / 3600)
    assert "64 x H100 80GB HBM3" in text
    assert f"{cost.hours * 60:,.1f} minutes" in text
    assert f"{cost.hours * 64 * 2.5:,.2f} (at 2.5 for a device and hour)" in text
    assert "40% of 989.4 TFLOP/s (bf16, dense)" in text
    faster, _ = cost_of(f"{flags} --num_epochs 2", **costs, assume_mfu=0.5)
    assert faster.hours == pytest.approx(cost.hours * 2 * 0.4 / 0.5)
    few, _ = cost_of(f"{flags} --max_steps 10", **costs)
    assert few.tokens == 10 * 64 * 4096


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_weights_cost_less(tied: bool) -> None:
    config = make_config(tie_word_embeddings=tied)
    flags = "--plugin ddp --mixed_precision fp32"
    plain, text = cost_of(flags, 80, config=config)
    assert plain.frozen_flops_per_token == 0
    assert plain.flops_per_token == flops_per_token(config, 64, 64 * 64)
    assert "Frozen" not in text
    frozen, text = cost_of(f"{flags} --freeze_non_embeds_params", 80, config=config)
    body = matrix_parameters(config) - config.vocab_size * config.hidden_size
    assert frozen.frozen_flops_per_token == 2 * body
    assert "Frozen weights: 4 FLOPs" in text
    lora, _ = cost_of(f"{flags} --lora_rank 2", 80, config=config)
    assert lora.frozen_flops_per_token == 2 * matrix_parameters(config)


def test_without_a_known_device_there_is_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flags, config = "--plugin zero2 --mixed_precision bf16", make_config()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cost, text = cost_of(flags, 80, config=config, price_per_hour=1.0)
    assert cost.hours is None
    assert "not given: no GPU found; choose a device with --device_name" in text
    assert "price" not in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found, text = cost_of(flags, 80, config=config)
    assert found.peak == 989.4e12
    assert "1 x NVIDIA H200" in text
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Abacus")
    _, text = cost_of(flags, 80, config=config)
    assert "no vendor's peak is known for Abacus in bf16" in text


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (0.001, "3.6 seconds"),
        (0.5, "30.0 minutes"),
        (47, "47.0 hours"),
        (96, "96.0 hours (4.0 days)"),
    ],
)
def test_times_to_read(hours: float, text: str) -> None:
    cost = RunCost(3600 * hours, 1e12, 0.0, 1, 1e12, 1.0)
    assert cost.hours == pytest.approx(hours)
    assert text in format_cost(cost, CostSettings(device_name=H100), "bf16")


def test_wrong_values(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--device_name H100 --assume_mfu 40 --price_per_hour -1")
    errors = capsys.readouterr().err
    assert "--device_name H100: unknown device; choose from H100 80GB HBM3, H100 PCIe, H100 NVL" in errors
    assert "--assume_mfu 40: must be at most 1" in errors
    assert "--price_per_hour -1: must be at least 0" in errors
    assert parse("--device_name h200").costs.device_name == "H200"
