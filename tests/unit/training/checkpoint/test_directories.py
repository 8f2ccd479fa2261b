"""Which directories are checkpoints, weights, or remains of a save."""

from __future__ import annotations

import pytest

from colossal_llama.training.checkpoint.directories import remove_leftovers, resolve_checkpoint
from colossal_llama.utils.errors import UserError


def test_only_remains_of_saves_are_removed(tmp_path):
    """A save_dir may be a directory in which the user keeps other things."""
    remains = [
        ".epoch-0_step-9.unfinished",
        ".epoch-0_step-9.removed",
        ".epoch-1_step-10.old",
        ".modeling.unfinished",
        ".modeling.old",
    ]
    others = [".venv.old", ".config.unfinished", ".epoch-0_step-9.old.removed.mine", "epoch-0_step-9.old"]
    for name in [*remains, *others]:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_an_adapter_is_no_start_of_a_stage(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds a LoRA adapter.*--merge_lora"):
        resolve_checkpoint(str(tmp_path), tmp_path / "saves")
