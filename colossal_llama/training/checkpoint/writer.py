"""Checkpoints: complete or absent, exact on the same layout, and a plain Hugging Face directory inside.

    <save_dir>/epoch-0_step-100/
        modeling/            what `from_pretrained` reads: weights, config, generation config, tokenizer
        optimizer/           one safetensors file a shard: fp32 master weights, Adam moments
        adapter/             LoRA adapters, when `modeling/` has them merged
        rng/                 one file a rank: python, numpy, torch and CUDA generators
        lr_scheduler         the schedule, JSON
        running_states.json  position, data fingerprint, layout, arguments, versions
        COMPLETE             written last: sizes and XXH3 checksums of all other files, JSON

A save copies what training is about to change, and writes the copy beside training under a hidden name. Once
every process has written its share, the main one lists all files, and renames the directory.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from colossal_llama.training.checkpoint.directories import (
    COMPLETE_FILE,
    SCHEDULE_FILE,
    STATE_FILE,
    checkpoint_name,
    list_checkpoints,
)
from colossal_llama.training.checkpoint.files import (
    BackgroundWrite,
    CopyBuffers,
    FileJobs,
    Manifest,
    SaveError,
    copy_bytes,
    is_disk_error,
    list_files,
)
from colossal_llama.training.checkpoint.modeling_files import (
    MODELING_DIRECTORY,
    add_modeling,
    add_small_files,
    hf_shard_names,
    name_weight_files,
)
from colossal_llama.training.checkpoint.optimizer_files import (
    OPTIMIZER_DIRECTORY,
    add_optimizer,
    read_other_layout,
    read_own_shard,
)
from colossal_llama.training.checkpoint.random_state import random_state, restore_random_state
from colossal_llama.training.checkpoint.record import RunRecord, SavedRun, state_json
from colossal_llama.training.llama.adapters import is_embedding
from colossal_llama.training.plugins import PLUGINS, find_plugin
from colossal_llama.training.schedule import LearningRateSchedule
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import sync_directory, write_json

if TYPE_CHECKING:
    from colossal_llama.training.checkpoint.model_files import ModelFiles
    from colossal_llama.training.plugins.base import Plugin

_RNG_DIRECTORY = "rng"
# Part of the memory that is free which a copy of the state may take.
_COPY_SHARE = 0.7


@dataclass
class SaveReport:
    """Attributes:
    path: the checkpoint, complete.
    pause_seconds: for how long training stood still.
    seconds: from the beginning of the save until the checkpoint was complete.
    num_bytes: of all files.
    """

    path: Path
    pause_seconds: float
    seconds: float
    num_bytes: int

    def __str__(self) -> str:
        speed = self.num_bytes / 1e9 / max(self.seconds, 1e-9)
        return (
            f"Saved {self.path}: {self.num_bytes / 1e9:.3g} GB in {self.seconds:.1f} s ({speed:.2f} GB/s), "
            f"training paused for {self.pause_seconds:.1f} s"
        )


@dataclass
class _Pending:
    target: Path
    aside: Path
    write: BackgroundWrite
    started: float
    pause_seconds: float


class CheckpointWriter:
    """Saves and loads the whole state of a run. `begin` and `finish` are called by every rank, `is_written`
    by each for itself.

    Args:
        files: what is saved beside the weights; the main process needs them.
        save_total_limit: newest checkpoints to keep; 0 keeps all.
        record: what a resumed run compares itself with.
        in_background: write while training continues, where the memory for a copy is there.
    """

    def __init__(
        self,
        save_dir: Path,
        plugin: Plugin,
        files: ModelFiles | None,
        schedule: LearningRateSchedule,
        save_total_limit: int,
        record: RunRecord,
        in_background: bool,
    ) -> None:
        self.save_dir, self.plugin, self.files = save_dir, plugin, files
        self.schedule, self.save_total_limit, self.record = schedule, save_total_limit, record
        self.is_main = dist.get_rank() == 0
        self.in_background = in_background and plugin.saves_by_parameter
        self._buffers = CopyBuffers()
        self._has_copied = False
        self._pending: _Pending | None = None

    @property
    def is_saving(self) -> bool:
        return self._pending is not None

    @property
    def is_written(self) -> bool:
        """Whether this process has written its share of the save in progress, or failed to."""
        return self._pending is not None and self._pending.write.is_done

    def begin(self, state: TrainState) -> None:
        """Starts a checkpoint: after it returns, training may change everything.

        Raises:
            OSError: on every rank, when any rank could not begin.
        """
        assert self._pending is None, "one save at a time"
        started = time.perf_counter()
        target = self.save_dir / checkpoint_name(state)
        aside = self.save_dir / f".{target.name}.unfinished"

        def make_directories() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            for name in (OPTIMIZER_DIRECTORY, _RNG_DIRECTORY, MODELING_DIRECTORY):
                (aside / name).mkdir(parents=True)

        self._together(make_directories, aside, main_only=True)
        in_background = self.in_background and self._copy_fits()
        self._buffers.start()
        plan = FileJobs(aside, self._buffers if in_background else None)

        def collect() -> None:
            if self.plugin.saves_by_parameter:
                add_optimizer(plan, self.plugin)
                add_modeling(plan, self.plugin, self.files, self.is_main, MODELING_DIRECTORY)
            else:
                self.plugin.save_state(aside / OPTIMIZER_DIRECTORY)
                self._add_own_modeling(plan, aside / MODELING_DIRECTORY, f"{MODELING_DIRECTORY}/")
            plan.add_bytes(f"{_RNG_DIRECTORY}/rank-{dist.get_rank():05d}.pt", random_state())
            if self.is_main:
                schedule = {**self.schedule.to_json(), "step": state.step}
                for name, value in (
                    (SCHEDULE_FILE, schedule),
                    (STATE_FILE, state_json(self.record, state)),
                ):
                    plan.add_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

        self._together(collect, aside)
        write = BackgroundWrite(plan, inline=not in_background)
        pause = time.perf_counter() - started
        self._pending = _Pending(target, aside, write, started, pause)

    def finish(self) -> SaveReport:
        """Waits until every process has written, and gives the checkpoint its name.

        Raises:
            OSError: on every rank, when any rank could not write; nothing is left of the checkpoint.
        """
        pending = self._pending
        assert pending is not None, "begin comes first"
        self._pending = None
        waiting = time.perf_counter()
        pending.write.wait()
        shares = self._together(
            lambda: _raise_or(pending.write.failure, (pending.write.listing, pending.write.plan.location)),
            pending.aside,
        )
        num_bytes = self._together(lambda: self._complete(pending, shares), pending.aside, main_only=True)[0]
        now = time.perf_counter()
        pause = pending.pause_seconds + now - waiting
        return SaveReport(pending.target, pause, now - pending.started, num_bytes)

    def save(self, state: TrainState) -> SaveReport:
        """Begins and finishes."""
        self.begin(state)
        return self.finish()

    def _complete(self, pending: _Pending, shares: list[tuple[Manifest, dict]]) -> int:
        """Lists all files with size and checksum, and renames the directory; returns the bytes in it."""
        aside = pending.aside
        listing: Manifest = {}
        location: dict[str, tuple[str, int]] = {}
        for part, part_location in shares:
            listing.update(part)
            location.update(part_location)
        if location:
            renamed = hf_shard_names(location)
            for old, new in renamed.items():
                old, new = f"{MODELING_DIRECTORY}/{old}", f"{MODELING_DIRECTORY}/{new}"
                listing[new] = listing.pop(old)
            listing.update(name_weight_files(aside, MODELING_DIRECTORY, location))
        unlisted = [
            path
            for path in aside.rglob("*")
            if path.is_file() and str(path.relative_to(aside)) not in listing
        ]
        listing.update(list_files(aside, unlisted))
        write_json(aside / COMPLETE_FILE, dict(sorted(listing.items())))
        for directory in [aside, *(path for path in aside.rglob("*") if path.is_dir())]:
            sync_directory(directory)
        _replace(aside, pending.target)
        self._remove_old(keep=pending.target)
        return sum(size for size, _ in listing.values())

    def _add_own_modeling(self, plan: FileJobs, directory: Path, prefix: str) -> None:
        """A model directory whose weights the plugin writes itself; the other files come after them."""
        self.plugin.save_weights(directory)
        if self.is_main:
            assert self.files is not None
            add_small_files(plan, self.files.beside_weights, prefix)

    def _copy_fits(self) -> bool:
        """Whether all processes of all hosts have the memory for a copy of what they will write.

        Asked until a first copy was made, whose memory is kept.
        """
        import psutil

        needed = self._copy_bytes()
        if self._has_copied:
            return True
        available = psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        fits: list[bool] = [True] * dist.get_world_size()
        dist.all_gather_object(fits, needed < available * _COPY_SHARE)
        if not all(fits):
            self.in_background = False
            log(
                f"Checkpoints pause training while they are written: {available / 1e9:.1f} GB of memory a "
                f"process are free, a copy takes up to {needed / 1e9:.1f} GB"
            )
        self._has_copied = all(fits)
        return all(fits)

    def _copy_bytes(self) -> int:
        """What this process copies at most: its share of the optimizer and of the weights, and some room."""
        plugin = self.plugin
        optimizer = sum(
            copy_bytes(master) + sum(map(copy_bytes, self._moments(master)))
            for _, master in plugin.master_weights().values()
        )
        weights = sum(map(copy_bytes, plugin.causal_lm.parameters()))
        if plugin.settings.adaptation.lora_rank:
            # The main process alone writes any: all of them merged, and the embeddings where they train.
            trained = 0
            if plugin.settings.adaptation.trains_embeddings_beside_lora:
                named = plugin.causal_lm.named_parameters()
                trained = sum(copy_bytes(parameter) for name, parameter in named if is_embedding(name))
            weights = self.is_main * (weights * plugin.settings.adaptation.merge_lora + trained)
        else:
            weights = weights * plugin.layout.tp // plugin.shard_coordinates().num_replicas
        return max(2 * optimizer, optimizer + weights)

    def _moments(self, master: torch.Tensor) -> list[torch.Tensor]:
        state = self.plugin.optimizer.optim.state.get(master, {})
        return [value for value in state.values() if isinstance(value, torch.Tensor)]

    def _together(self, action: Callable[[], Any], aside: Path, main_only: bool = False) -> list[Any]:
        """Runs `action` on every rank, or on the main one; returns the results of all (of the main one).

        Raises:
            SaveError: the same on all ranks, when it failed on any; what was half written is removed.
        """
        result = failure = None
        if self.is_main or not main_only:
            try:
                result = action()
            except Exception as error:  # the other ranks wait for this one's answer
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                failure = (f"{getattr(error, 'filename', None) or aside}: {reason}", is_disk_error(error))
        if main_only:
            answers: list[Any] = [(result, failure)]
            dist.broadcast_object_list(answers, src=0)
        else:
            answers = [None] * dist.get_world_size()
            dist.all_gather_object(answers, (result, failure))
        failures = [failure for _, failure in answers if failure is not None]
        if failures:
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            dist.barrier()
            text, is_disk = failures[0]
            raise SaveError(f"checkpoint not saved: {text}", is_disk)
        return [result for result, _ in answers]

    def save_final_modeling(self) -> Path:
        """Writes `<save_dir>/modeling`, replacing an older one only once the new one is complete."""
        target = self.save_dir / MODELING_DIRECTORY
        aside = self.save_dir / f".{MODELING_DIRECTORY}.unfinished"

        def make_directory() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        def write() -> dict[str, tuple[str, int]]:
            plan = FileJobs(aside, None)
            if self.plugin.saves_by_parameter:
                add_modeling(plan, self.plugin, self.files, self.is_main)
            else:
                self._add_own_modeling(plan, aside, "")
            plan.run()
            return plan.location

        def complete() -> None:
            location = {name: place for share in shares for name, place in share.items()}
            if location:
                name_weight_files(aside, "", location)
            sync_directory(aside)
            _replace(aside, target)

        self._together(make_directory, aside, main_only=True)
        shares = self._together(write, aside)
        self._together(complete, aside, main_only=True)
        return target

    def load(self, saved: SavedRun) -> TrainState:
        """Restores optimizer, master weights, RNG and position; every rank must call it.

        The weights themselves were loaded from `modeling/` when the model was made. On the layout that saved,
        the run continues bit for bit; on another, shards are put together and cut again, and random numbers
        start anew.

        Raises:
            UserError: the optimizer's files are a plugin's own, and the layout differs.
        """
        plugin, checkpoint, state = self.plugin, saved.checkpoint, replace(saved.state)
        changed = plugin.layout.changes_since(saved.record.layout)
        saved_by = saved.record.layout["plugin"]
        saved_by_parameter = saved_by not in PLUGINS or find_plugin(saved_by).saves_by_parameter
        if not (plugin.saves_by_parameter and saved_by_parameter):
            if changed:
                raise UserError(
                    f"--load_checkpoint {checkpoint}: saved by another layout ({', '.join(changed)}), and "
                    "Gemini's checkpoints fit their own only; use that one, or start a new stage from "
                    f"{checkpoint / MODELING_DIRECTORY}"
                )
            plugin.load_state(checkpoint / OPTIMIZER_DIRECTORY)
        elif changed:
            read_other_layout(checkpoint / OPTIMIZER_DIRECTORY, plugin)
        else:
            read_own_shard(checkpoint / OPTIMIZER_DIRECTORY, plugin)
        if changed:
            mixed = (plugin.settings.optimizer.seed * 100_003 + dist.get_rank()) * 100_003 + state.step
            torch.manual_seed(mixed % 2**63)  # torch takes 64 bits
            log(
                f"The layout has changed ({', '.join(changed)}): training continues at the same row, equal "
                "within rounding, not bit for bit"
            )
        else:
            restore_random_state(checkpoint / _RNG_DIRECTORY / f"rank-{dist.get_rank():05d}.pt")
        return state

    def _remove_old(self, keep: Path) -> None:
        if not self.save_total_limit:
            return
        for checkpoint in list_checkpoints(self.save_dir)[: -self.save_total_limit]:
            if checkpoint != keep:
                # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
                doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
                checkpoint.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _replace(aside: Path, target: Path) -> None:
    """Gives a complete directory its name; one that has the name already goes only then."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    aside.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _raise_or(failure: OSError | None, value: Any) -> Any:
    if failure is not None:
        raise failure
    return value
