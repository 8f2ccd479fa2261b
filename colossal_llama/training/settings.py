"""What the user asked `train.py` for: one frozen object for each concern, every flag declared once.

Nothing heavy is imported here: `--help` has to answer in under a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colossal_llama.training.adaptation import AdaptationSettings
from colossal_llama.training.layout import LayoutSettings
from colossal_llama.utils.arguments import (
    MAX_ROW_TOKENS,
    existing_directory,
    non_negative_int,
    number,
    positive_int,
    seed_number,
)
from colossal_llama.utils.settings import Flag, OnResume, as_json, flag, flags_of

FREE = OnResume.FREE


def _model_path(text: str) -> str:
    """A local model directory, or a name on the hub."""
    path = Path(text)
    if (text.startswith(("/", ".", "~")) or path.exists()) and not (path / "config.json").is_file():
        raise ValueError("no config.json there; give a Hugging Face model directory")
    return text


def _checkpoint(text: str) -> str:
    if text != "latest" and not Path(text).is_dir():
        raise ValueError("no such directory; give a checkpoint, weights, or `latest`")
    return text


@dataclass(frozen=True)
class DataSettings:
    """The model that is trained and the rows that it is trained on."""

    pretrained: str = flag(
        None,
        "Hugging Face model, its tokenizer included",
        type=_model_path,
        required=True,
        on_resume=FREE,
    )
    dataset: list[Path] | None = flag(
        None,
        "prepared part directories, or arrow/ directories",
        nargs="+",
        type=existing_directory,
        on_resume=FREE,
    )
    eval_dataset: list[Path] | None = flag(
        None,
        "prepared data to evaluate on, each set by itself and all together; off when not given",
        nargs="+",
        type=existing_directory,
        on_resume=FREE,
    )
    eval_interval: int = flag(
        0, "optimizer steps between evaluations; 0 = epoch ends", type=non_negative_int, on_resume=FREE
    )
    eval_at_start: bool = flag(
        False, "evaluate before the first step too: step 0 of the metrics and the curves", on_resume=FREE
    )
    max_length: int = flag(4096, "longest row, in tokens", type=number(int, 2, MAX_ROW_TOKENS))
    isolate_documents: bool = flag(
        True, "documents packed into a row do not see each other; switch it off for the original's bins"
    )
    bucketed: bool = flag(False, "visit buckets (part-N of all data sets) in order")
    padding_mode: str = flag("max_length", "length rows are padded to", choices=("max_length", "longest"))
    pad_token: str = flag("eos", "token that fills rows; never seen, never learned", choices=("eos", "unk"))
    num_workers: int = flag(
        2, "data loading processes per rank; 0 = in the trainer", type=non_negative_int, on_resume=FREE
    )
    trust_remote_code: bool = flag(
        False,
        "run Python code that the model directory or hub repository ships; off: its files are only data",
        on_resume=FREE,
    )


@dataclass(frozen=True)
class OptimizerSettings:
    """How long training lasts and how the optimizer steps."""

    num_epochs: int = flag(1, "passes over the data", type=positive_int)
    max_steps: int = flag(
        -1,
        "stop after this many optimizer steps of the run; -1 = all. The schedule keeps its full length",
        type=number(int, minimum=-1),
        on_resume=FREE,
    )
    lr: float = flag(3e-4, "peak learning rate", type=number(float, minimum=0))
    weight_decay: float = flag(0.1, "AdamW weight decay", type=number(float, minimum=0))
    grad_clip: float = flag(
        1.0,
        "largest gradient norm; 0 = no clipping",
        type=number(float, minimum=0),
        also=("--gradient_clipping",),
    )
    warmup_steps: int | None = flag(
        None, "linear warm-up, in optimizer steps (default: 2.5 %% of the steps)", type=non_negative_int
    )
    seed: int = flag(42, "seed of every random choice", type=seed_number)
    deterministic: bool = flag(False, "deterministic CUDA kernels: exact resume there too", on_resume=FREE)


@dataclass(frozen=True)
class OutputSettings:
    """What a run continues from, and what it writes."""

    load_checkpoint: str | None = flag(
        None,
        "a step directory, `latest`, or a directory of weights alone, which starts a new stage",
        type=_checkpoint,
        on_resume=FREE,
    )
    save_dir: Path = flag(Path("checkpoint_dir"), "directory of checkpoints", type=Path, on_resume=FREE)
    save_interval: int = flag(
        1000, "optimizer steps between saves; 0 = none", type=non_negative_int, on_resume=FREE
    )
    save_total_limit: int = flag(
        0, "newest checkpoints to keep; 0 = all", type=non_negative_int, on_resume=FREE
    )
    async_save: bool = flag(
        True,
        "write checkpoints while training continues, where the memory for a copy is there",
        on_resume=FREE,
    )
    skip_save_each_epoch: bool = flag(False, "no checkpoint at epoch ends", on_resume=FREE)
    tensorboard_dir: Path = flag(Path("logs_dir"), "directory of the metrics", type=Path, on_resume=FREE)
    config_file: Path = flag(
        Path("config_file"),
        "JSON file that records the configuration; replaces no other kind of file",
        type=Path,
        on_resume=FREE,
    )
    dry_run: bool = flag(
        False,
        "check what a run checks before its first step, print the plan, train nothing; one process",
        on_resume=FREE,
    )
    benchmark: bool = flag(False, "train on random rows, print speed, save nothing", on_resume=FREE)
    num_samples: int = flag(500, "random rows of --benchmark", type=positive_int, on_resume=FREE)


@dataclass(frozen=True)
class RunSettings:
    """Everything that the user asked for."""

    data: DataSettings
    layout: LayoutSettings
    optimizer: OptimizerSettings
    adaptation: AdaptationSettings
    output: OutputSettings

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.data, self.layout, self.optimizer, self.adaptation, self.output)

    def as_json(self) -> Mapping[str, Any]:
        """The values of all flags by name, as the record of a run has them."""
        return as_json(self.parts)

    def flags(self) -> dict[str, Flag]:
        """How each flag was declared, by name."""
        return flags_of(self.parts)


# Settings class of each field of `RunSettings` -> its title on the `--help` page.
TITLES: dict[str, tuple[type, str]] = {
    "data": (DataSettings, "model and data"),
    "layout": (LayoutSettings, "plugin and layout"),
    "optimizer": (OptimizerSettings, "optimization"),
    "adaptation": (AdaptationSettings, "what trains"),
    "output": (OutputSettings, "output"),
}
