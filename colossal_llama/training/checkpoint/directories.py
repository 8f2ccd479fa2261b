"""Checkpoints of a run by name: which there are, which are complete, what `--load_checkpoint` means."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from colossal_llama.training.checkpoint.files import checksum_file
from colossal_llama.training.llama.loading import is_weights_directory
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object

COMPLETE_FILE = "COMPLETE"
STATE_FILE = "running_states.json"
SCHEDULE_FILE = "lr_scheduler"
_NAME = re.compile(r"epoch-(\d+)_step-(\d+)$")
# What a save or a removal works on; a directory of the user that ends like it is none of them.
_LEFTOVER = re.compile(r"\.(epoch-\d+_step-\d+|modeling)\.(unfinished|removed|old)")


def checkpoint_name(state: TrainState) -> str:
    return f"epoch-{state.epoch}_step-{state.step}"


def list_checkpoints(save_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; what was never finished has no such name."""
    if not save_dir.is_dir():
        return []
    found = [
        path for path in save_dir.iterdir() if _NAME.match(path.name) and (path / COMPLETE_FILE).is_file()
    ]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    return int(_NAME.match(checkpoint.name).group(2))


def remove_leftovers(save_dir: Path) -> None:
    """Removes what saves and removals that were cut short have left; for the run that holds the lock."""
    for path in save_dir.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def find_damage(checkpoint: Path, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint's files (missing, other size, other checksum), or None.

    Args:
        share, num_shares: looks at one of so many shares of the files, of about the same number of bytes.
    """
    try:
        expected = read_json_object(checkpoint / COMPLETE_FILE)
        largest_first = sorted(
            ((name, int(size), checksum) for name, (size, checksum) in expected.items()),
            key=lambda item: -item[1],
        )
    except (OSError, UserError, TypeError, ValueError):
        return (
            f"{checkpoint / COMPLETE_FILE} cannot be read: the checkpoint was never finished, or is damaged"
        )
    for name, size, checksum in largest_first[share::num_shares]:
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if checksum_file(path) != checksum:
            return f"{path} has changed since it was written (its checksum differs)"
    return None


def resolve_checkpoint(
    load_checkpoint: str | None, save_dir: Path, find_damage: Callable[[Path], str | None] = find_damage
) -> tuple[Path | None, Path | None]:
    """What `--load_checkpoint` means.

    Returns:
        (step directory to resume from, directory of weights alone that starts a new stage); at most one is
        set.

    Raises:
        UserError: the directory is neither, or a checkpoint that was named is damaged.
    """
    if load_checkpoint is None:
        return None, None
    if load_checkpoint == "latest":
        candidates = list_checkpoints(save_dir)
        for checkpoint in reversed(candidates):
            damage = find_damage(checkpoint)
            if damage is None:
                return checkpoint, None
            warn(f"{damage}; falling back to the checkpoint before")
        if candidates:
            raise UserError(f"--load_checkpoint latest: every checkpoint in {save_dir} is damaged")
        log(f"--load_checkpoint latest: nothing saved in {save_dir} yet, starting from the beginning")
        return None, None
    path = Path(load_checkpoint)
    if (path / STATE_FILE).is_file():
        if not (path / COMPLETE_FILE).is_file() and is_weights_directory(path / "modeling"):
            raise UserError(
                f"--load_checkpoint {path}: unfinished, or the original's, which lacks what an exact "
                f"resume needs; give {path / 'modeling'} to start a new stage from its weights"
            )
        damage = find_damage(path)
        if damage is not None:
            raise UserError(f"--load_checkpoint {path}: {damage}; use another checkpoint")
        return path, None
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"--load_checkpoint {path}: holds a LoRA adapter, and a new stage starts from whole weights; "
            "continue its run with --merge_lora, which saves them merged, or resume from a step directory"
        )
    if is_weights_directory(path):
        return None, path
    raise UserError(
        f"--load_checkpoint {path}: neither a checkpoint (no {STATE_FILE}) nor model weights "
        "(no *.safetensors or *.bin)"
    )
