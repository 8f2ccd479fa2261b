"""What a checkpoint takes and says: the memory of a copy, failures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from colossal_llama.training.adaptation import AdaptationSettings
from colossal_llama.training.checkpoint.files import SaveError
from colossal_llama.training.checkpoint.writer import CheckpointWriter
from colossal_llama.training.layout import Layout
from colossal_llama.training.loop import TrainingLoop
from colossal_llama.utils.errors import UserError

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
    given = {**unset, **flags}
    adaptation = AdaptationSettings(**{name: value for name, value in given.items() if name != "tp"})
    writer.plugin = SimpleNamespace(
        settings=SimpleNamespace(adaptation=adaptation),
        layout=Layout(tp=given["tp"]),
        causal_lm=torch.nn.ModuleDict({"lm_head": torch.nn.Linear(WEIGHTS, 1, bias=False)}),
        master_weights=lambda: {"weight": (None, master)},
        optimizer=SimpleNamespace(optim=SimpleNamespace(state={master: moments})),
        shard_coordinates=lambda: SimpleNamespace(num_replicas=2),
    )
    assert writer._copy_bytes() == expected


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, without a process group."""
    dist = "colossal_llama.training.checkpoint.writer.dist."
    monkeypatch.setattr(f"{dist}get_world_size", lambda: 1)
    monkeypatch.setattr(f"{dist}barrier", lambda: None)
    monkeypatch.setattr(f"{dist}all_gather_object", lambda found, own: found.__setitem__(0, own))


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (OSError(28, "No space left on device", "/d/x"), "/d/x: No space left on device", "free space"),
        (KeyError("rope"), "aside: KeyError: 'rope'", "the disk is not to blame"),
    ],
)
def test_a_failed_save_names_its_cause_on_every_rank(alone, tmp_path, error, said, remedy):
    def fail() -> None:
        raise error

    writer = object.__new__(CheckpointWriter)
    writer.is_main = True
    with pytest.raises(SaveError, match="checkpoint not saved: ") as caught:
        writer._together(fail, tmp_path / "aside")
    assert str(caught.value).endswith(said)
    loop = object.__new__(TrainingLoop)
    loop.failed_saves = 0
    with pytest.raises(UserError) as reported:
        loop._report_failed_save(caught.value, is_last=True)
    assert said in str(reported.value)
    assert remedy in str(reported.value)
