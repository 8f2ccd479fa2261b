"""Before a checkpoint is written: the memory that a copy takes."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch

from colossal_llama.training.checkpoint import CheckpointWriter

WEIGHTS, TRAINED = 1000, 10


# In bytes: four for a weight, twelve for what the optimizer has of each that trains.
@pytest.mark.parametrize(
    ("flags", "is_main", "trained", "expected"),
    [
        ({}, True, WEIGHTS, 2 * 12 * WEIGHTS),
        ({}, True, TRAINED, 12 * TRAINED + 4 * WEIGHTS // 2),  # the embeddings alone are trained
        ({"tp": 4}, True, TRAINED, 12 * TRAINED + 4 * 4 * WEIGHTS // 2),  # gathered from four
        ({"lora_rank": 4}, True, TRAINED, 2 * 12 * TRAINED),
        ({"lora_rank": 4, "merge_lora": True}, True, TRAINED, 12 * TRAINED + 4 * WEIGHTS),
        ({"lora_rank": 4, "merge_lora": True}, False, TRAINED, 2 * 12 * TRAINED),
        ({"lora_rank": 4, "lora_embeddings": "train"}, True, TRAINED, 12 * TRAINED + 4 * WEIGHTS),
        ({"lora_rank": 4, "lora_embeddings": "train"}, False, TRAINED, 2 * 12 * TRAINED),
        (
            {"lora_rank": 4, "lora_embeddings": "train", "merge_lora": True},
            True,
            TRAINED,
            12 * TRAINED + 2 * 4 * WEIGHTS,  # merged, and once more beside the adapters
        ),
    ],
)
def test_a_copy_takes_optimizer_and_weights(flags, is_main, trained, expected):
    master = torch.zeros(trained)
    moments = {"step": 1, "exp_avg": torch.zeros(trained), "exp_avg_sq": torch.zeros(trained)}
    writer = object.__new__(CheckpointWriter)
    writer.is_main = is_main
    unset = {"lora_rank": 0, "lora_embeddings": None, "merge_lora": False, "tp": 1}
    writer.strategy = SimpleNamespace(
        args=argparse.Namespace(**{**unset, **flags}),
        causal_lm=torch.nn.ModuleDict({"lm_head": torch.nn.Linear(WEIGHTS, 1, bias=False)}),
        master_weights=lambda: {"weight": (None, master)},
        optimizer=SimpleNamespace(optim=SimpleNamespace(state={master: moments})),
        shard_place=lambda: SimpleNamespace(num_replicas=2),
    )
    assert writer._copy_bytes() == expected
