"""The directory of a model that a script writes: what may be replaced there, what must not lie beside it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from colossal_llama.model.model_config import CONFIG_FILE, GENERATION_CONFIG_FILE
from colossal_llama.utils.errors import UserError

# What calibrate_output.py reports; true of the weights that it was written with, and of no others.
CALIBRATION_FILE = "output_calibration.json"
WEIGHT_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.index.json",
)


def weight_names(directory: Path) -> list[str]:
    """Names of all files with weights, and of their indices."""
    names = {path.name for pattern in WEIGHT_PATTERNS for path in directory.glob(pattern)}
    return sorted(name for name in names if not name.startswith("."))


def find_foreign_files(target: Path, marker: str, tokenizer_dir: Path | None = None) -> list[str]:
    """What would be replaced in a directory, unless an earlier run of the same script made it.

    Args:
        marker: name of the file that says so.
        tokenizer_dir: the tokenizer that the model gets; it may lie in the directory already.
    """
    from colossal_llama.tokenizer.tokenizer_files import files_of_tokenizer, is_extension

    if not target.exists() or (target / marker).is_file():
        return []
    found = [name for name in (CONFIG_FILE, GENERATION_CONFIG_FILE) if (target / name).exists()]
    found += weight_names(target)
    is_there = tokenizer_dir is not None and target.samefile(tokenizer_dir)
    if not is_there and not is_extension(target):
        found += files_of_tokenizer(target)
    return found


def refuse_other_weights(target: Path, flag: str, expected: Collection[str]) -> None:
    """Weights of another model beside the new ones could be loaded in their place."""
    if others := sorted(set(weight_names(target)) - set(expected)):
        raise UserError(
            f"{flag} {target}: holds other weights ({', '.join(others[:5])}), which might be "
            "loaded in place of the new ones; remove them or choose another directory"
        )


def refuse_full_disk(target: Path, flag: str, needed: int) -> None:
    """The disk has to hold `needed` bytes of weights; those of an earlier run make room."""
    present = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    free = shutil.disk_usage(target).free + present
    if free < needed:
        raise UserError(
            f"{flag} {target}: the model needs {needed / 1e9:.2f} GB, the disk has "
            f"{free / 1e9:.2f} GB free; choose another disk or make room"
        )


def copy_generation_config(source: Path, target: Path) -> None:
    """Copies the generation configuration of a model, where it has one."""
    generation = source / GENERATION_CONFIG_FILE
    if generation.exists():
        content = generation.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a mark that other programs refuse
        (target / GENERATION_CONFIG_FILE).unlink(missing_ok=True)  # not through a link
        (target / GENERATION_CONFIG_FILE).write_bytes(content)
