"""The record of a run: everything that tells it from another run, and what a checkpoint says of where it was.

`running_states.json` of a checkpoint holds the record with the state of the loop, `--config_file` the record
alone. Both are written and read here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.training.checkpoint.directories import SCHEDULE_FILE, STATE_FILE
from colossal_llama.training.state import TrainState
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json, read_json_object

if TYPE_CHECKING:
    from transformers import LlamaConfig

# What of the model's configuration the forward pass depends on.
MODEL_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
)
_PACKAGES = ("torch", "colossalai", "transformers", "datasets", "peft", "colossal_llama")
# Not written where they are not there: the key is new, or not for every run.
_OPTIONAL = ("adapter_base",)


@dataclass(frozen=True)
class RunRecord:
    """Attributes:
    arguments: every flag of train.py by name.
    layout: number of processes, plugin and sizes, as `Layout.as_json` has them.
    data: fingerprint, rows and tokens of the training data.
    rows_per_step, total_steps: of the run, with its layout.
    model: `MODEL_FIELDS` of the configuration.
    versions: of Python and the libraries.
    stage_weights: directory that `--load_checkpoint` started a new stage from.
    adapter_base: {"dtype", "sum"} of the weights under LoRA adapters.
    """

    arguments: Mapping[str, Any]
    layout: Mapping[str, Any]
    data: Mapping[str, Any]
    rows_per_step: int
    total_steps: int
    model: Mapping[str, Any]
    versions: Mapping[str, str]
    stage_weights: str | None = None
    adapter_base: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        for name in _OPTIONAL:
            if value[name] is None:
                del value[name]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunRecord:
        """Reads what any version wrote; raises KeyError where something compulsory is missing."""
        known = {each.name for each in fields(cls)}
        defaults: dict[str, Any] = {"model": {}, "versions": {}, "total_steps": 0}
        found = {**defaults, **{name: part for name, part in value.items() if name in known}}
        missing = {"arguments", "layout", "data", "rows_per_step"} - found.keys()
        if missing:
            raise KeyError(", ".join(sorted(missing)))
        return cls(**found)


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint's record of its run, and where the run was."""

    checkpoint: Path
    record: RunRecord
    state: TrainState

    @classmethod
    def read(cls, checkpoint: Path) -> SavedRun:
        """Raises `UserError` naming the file when it is not a record of this suite."""
        path = checkpoint / STATE_FILE
        value = read_json_object(path)
        try:
            record, state = RunRecord.from_json(value), TrainState(**value["state"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: not the record of a run of this suite ({error})") from None
        return cls(checkpoint, record, state)

    @property
    def schedule(self) -> Mapping[str, Any]:
        """The learning rate's schedule (`lr_scheduler`)."""
        return read_json(self.checkpoint / SCHEDULE_FILE)


def state_json(record: RunRecord, state: TrainState) -> dict[str, Any]:
    """What `running_states.json` holds."""
    return {"state": state.to_json(), **record.to_json()}


def model_facts(config: LlamaConfig, new_ids: range | None = None) -> dict[str, Any]:
    """What a resumed run's model must share with the saved one.

    Args:
        new_ids: ids of new pieces, where their rows alone train.
    """
    facts = {name: getattr(config, name, None) for name in MODEL_FIELDS}
    if new_ids is not None:
        facts["new_rows"] = [new_ids.start, new_ids.stop]
    return facts


def installed_versions() -> dict[str, str]:
    """Of Python and the libraries that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
