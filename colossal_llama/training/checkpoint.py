"""Checkpoints: complete or absent, exact on the same layout, and a plain Hugging Face directory inside.

    <save_dir>/epoch-0_step-100/
        modeling/            what `from_pretrained` reads: weights, config, generation config, tokenizer
        optimizer/           one safetensors file a shard: fp32 master weights, Adam moments
        adapter/             LoRA adapters, when `modeling/` has them merged
        rng/                 one file a rank: python, numpy, torch and CUDA generators
        lr_scheduler         the schedule, JSON
        running_states.json  position, data fingerprint, layout, arguments, versions
        COMPLETE             written last: sizes and CRC-32 of all other files, JSON

The directory is written under a hidden name, made durable, and renamed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from colossal_llama.training.arguments import GEMINI_PLUGINS
from colossal_llama.training.model import is_weights_directory
from colossal_llama.training.schedule import LearningRateSchedule
from colossal_llama.training.state import TrainState
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json, sync_directory, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from colossal_llama.training.strategy import Strategy

COMPLETE_FILE = "COMPLETE"
ADAPTER_DIRECTORY = "adapter"
STATE_FILE = "running_states.json"
SCHEDULE_FILE = "lr_scheduler"
_NAME = re.compile(r"epoch-(\d+)_step-(\d+)$")
# Weight files of `modeling/` are cut at this size.
MAX_FILE_BYTES = 5 * 1024**3
_MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_name(state: TrainState) -> str:
    return f"epoch-{state.epoch}_step-{state.step}"


def list_checkpoints(save_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; what was never finished has no such name."""
    if not save_dir.is_dir():
        return []
    found = [
        path for path in save_dir.iterdir() if _NAME.match(path.name) and (path / COMPLETE_FILE).is_file()
    ]
    return sorted(found, key=lambda path: int(_NAME.match(path.name).group(2)))


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files (missing, other size, other CRC-32), or None."""
    try:
        expected = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (
            f"{checkpoint / COMPLETE_FILE} cannot be read: the checkpoint was never finished, or is damaged"
        )
    for name, (size, checksum) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes instead of {size}"
        if _crc32(path) != checksum:
            return f"{path} has changed since it was written (CRC-32 differs)"
    return None


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def resolve_checkpoint(load_checkpoint: str | None, save_dir: Path) -> tuple[Path | None, Path | None]:
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
    if is_weights_directory(path):
        return None, path
    raise UserError(
        f"--load_checkpoint {path}: neither a checkpoint (no {STATE_FILE}) nor model weights "
        "(no *.safetensors or *.bin)"
    )


class CheckpointWriter:
    """Saves and loads the whole state of a run.

    Args:
        save_total_limit: newest checkpoints to keep; 0 keeps all.
        settings: what a resumed run compares: arguments, layout, data fingerprint, versions.
    """

    def __init__(
        self,
        save_dir: Path,
        strategy: Strategy,
        tokenizer: PreTrainedTokenizerBase,
        schedule: LearningRateSchedule,
        save_total_limit: int,
        settings: dict[str, Any],
    ) -> None:
        self.save_dir, self.strategy, self.tokenizer = save_dir, strategy, tokenizer
        self.schedule, self.save_total_limit, self.settings = schedule, save_total_limit, settings
        self.is_main = dist.get_rank() == 0

    def save(self, state: TrainState) -> Path:
        """Writes a checkpoint; every rank must call it. Returns its directory."""
        target = self.save_dir / checkpoint_name(state)
        aside = self.save_dir / f".{target.name}.unfinished"
        if target.exists() and find_damage(target) is None:
            return target
        failure = None
        try:
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                (aside / "optimizer").mkdir(parents=True)
                (aside / "rng").mkdir()
        except OSError as error:
            failure = error
        self._agree(failure, aside)
        try:
            self._write_optimizer(aside / "optimizer")
            _save_rng(aside / "rng" / f"rank-{dist.get_rank():05d}.pt")
            if self.is_main:
                write_json(aside / SCHEDULE_FILE, {**self.schedule.__dict__, "step": state.step})
                write_json(aside / STATE_FILE, {"state": state.to_json(), **self.settings})
        except OSError as error:
            failure = error
        self._agree(failure, aside)
        self.save_modeling(aside / "modeling")
        try:
            if self.is_main and self.strategy.args.merge_lora:
                self.strategy.peft_model.save_pretrained(aside / ADAPTER_DIRECTORY)
            if self.is_main:
                _finish(aside, target)
                self._remove_old(keep=target)
        except OSError as error:
            failure = error
        self._agree(failure, aside)
        return target

    def _agree(self, failure: OSError | None, aside: Path) -> None:
        """Raises the same OSError on all ranks when any of them failed, and removes what was half written."""
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(
            failures, None if failure is None else f"{failure.filename}: {failure.strerror}"
        )
        reasons = [reason for reason in failures if reason is not None]
        if reasons:
            if self.is_main:
                shutil.rmtree(aside, ignore_errors=True)
            dist.barrier()
            raise OSError(f"checkpoint not saved: {reasons[0]}")

    def save_modeling(self, directory: Path) -> None:
        """Writes a complete Hugging Face model directory; every rank must call it."""
        strategy = self.strategy
        if self.is_main:
            directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        failure = None
        try:
            if strategy.args.lora_rank:
                if self.is_main:
                    _save_lora(strategy, directory)
            elif strategy.args.plugin in GEMINI_PLUGINS:
                strategy.booster.save_model(
                    strategy.model, str(directory), shard=True, size_per_shard=5 * 1024, use_safetensors=True
                )
            else:
                self._write_weights(directory)
            if self.is_main:
                if not (directory / "adapter_config.json").is_file():
                    _write_configs(strategy, directory)
                self.tokenizer.save_pretrained(directory)
        except (OSError, RuntimeError) as error:
            failure = OSError(getattr(error, "errno", None), str(error), str(directory))
        self._agree(failure, directory)

    def _write_weights(self, directory: Path) -> None:
        """Each pipeline stage writes its own safetensors files; rank 0 writes the index over all of them.

        Sharded tensors are gathered one at a time over the tensor parallel group; rows that pad the
        vocabulary are cut off. colossalai's own `save_model` fails on padded embeddings without tensor
        parallelism.
        """
        from colossalai.checkpoint_io.utils import gather_distributed_param

        strategy, args = self.strategy, self.strategy.args
        stage, takes_part, writes = 0, self.is_main, self.is_main
        if args.plugin == "3d":
            plugin = strategy.plugin
            stage = plugin.pg_mesh.coordinate(plugin.pp_axis)
            takes_part = dist.get_rank(plugin.mixed_dp_group) == 0
            writes = takes_part and dist.get_rank(plugin.tp_group) == 0
        location: dict[str, tuple[str, int]] = {}
        failure = None
        if takes_part:
            config = strategy.causal_lm.config
            pending: dict[str, torch.Tensor] = {}
            number = pending_bytes = 0

            def flush() -> None:
                nonlocal number, pending_bytes
                number += 1
                name = f"model-{stage + 1:05d}-{number:05d}.safetensors"
                for tensor_name, tensor in pending.items():
                    location[tensor_name] = (name, tensor.nbytes)
                save_file(pending, directory / name, metadata={"format": "pt"})
                pending.clear()
                pending_bytes = 0

            for name, parameter in strategy.causal_lm.named_parameters():
                tensor = gather_distributed_param(parameter, keep_vars=False)
                if not writes or failure is not None:
                    continue
                if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                    if config.tie_word_embeddings and name.startswith("lm_head"):
                        continue
                    tensor = tensor[: config.vocab_size]
                try:
                    if pending and pending_bytes + tensor.nbytes > MAX_FILE_BYTES:
                        flush()
                    pending[name] = tensor.detach().contiguous().cpu()
                    pending_bytes += tensor.nbytes
                except Exception as error:  # every rank must reach the collectives below
                    failure = error
            if writes and failure is None and pending:
                try:
                    flush()
                except Exception as error:
                    failure = error
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, location)
        if failure is not None:
            raise OSError(None, str(failure), str(directory)) from failure
        if self.is_main:
            _write_weight_index(directory, {k: v for each in gathered for k, v in each.items()})

    def save_final_modeling(self) -> Path:
        """Writes `<save_dir>/modeling`, replacing an older one only once the new one is complete."""
        target = self.save_dir / "modeling"
        aside = self.save_dir / ".modeling.unfinished"
        if self.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        dist.barrier()
        self.save_modeling(aside)
        if self.is_main:
            for path in sorted(aside.rglob("*")):
                _sync_file(path)
            old = self.save_dir / ".modeling.old"
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            aside.rename(target)
            sync_directory(self.save_dir)
            shutil.rmtree(old, ignore_errors=True)
        dist.barrier()
        return target

    def load(self, checkpoint: Path) -> TrainState:
        """Restores optimizer, master weights, RNG and position; every rank must call it.

        The weights themselves were loaded from `checkpoint/modeling` when the model was made.

        Raises:
            UserError: the layout differs from the one that saved.
        """
        saved = read_json(checkpoint / STATE_FILE)
        saved_layout, layout = saved["layout"], self.settings["layout"]
        if saved_layout != layout:
            changed = [
                f"{k} {saved_layout.get(k)} -> {layout.get(k)}"
                for k in layout
                if saved_layout.get(k) != layout[k]
            ]
            raise UserError(
                f"--load_checkpoint {checkpoint}: saved by another layout ({', '.join(changed)}); use "
                f"the same one, or start a new stage from {checkpoint / 'modeling'}"
            )
        self._read_optimizer(checkpoint / "optimizer")
        _load_rng(checkpoint / "rng" / f"rank-{dist.get_rank():05d}.pt")
        return TrainState(**saved["state"])

    def _shard_name(self) -> str | None:
        """File of this rank's optimizer shard; None when another rank holds the same and writes it."""
        strategy, args = self.strategy, self.strategy.args
        tensor = pipeline = 0
        sharded_by_zero = args.plugin.startswith("zero2") or (args.plugin == "3d" and args.zero_stage > 0)
        if args.plugin == "3d":
            mesh, plugin = strategy.plugin.pg_mesh, strategy.plugin
            tensor, pipeline = mesh.coordinate(plugin.tp_axis), mesh.coordinate(plugin.pp_axis)
            replica = dist.get_rank(plugin.mixed_dp_group)
        else:
            replica = dist.get_rank()
        return f"tp-{tensor:03d}_pp-{pipeline:03d}_zero-{replica if sharded_by_zero else 0:04d}.safetensors"

    def _writes_shard(self) -> bool:
        args = self.strategy.args
        if args.plugin.startswith("zero2") or (args.plugin == "3d" and args.zero_stage > 0):
            return True
        if args.plugin == "3d":
            return dist.get_rank(self.strategy.plugin.mixed_dp_group) == 0
        return self.is_main

    def _master_weights(self) -> dict[str, tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameter name -> (parameter of the model, what the optimizer updates: an fp32 master or
        shard of it).
        """
        optimizer = self.strategy.optimizer
        names = self.strategy.parameter_names
        masters = {}
        for parameter, name in names.items():
            if not parameter.requires_grad:
                continue
            if hasattr(optimizer, "working_to_master_param"):
                master = optimizer.working_to_master_param.get(id(parameter))
            elif hasattr(optimizer, "working_to_master_map"):
                master = optimizer.working_to_master_map.get(parameter)
            else:
                master = parameter
            if master is not None:
                masters[name] = (parameter, master)
        return masters

    def _write_optimizer(self, directory: Path) -> None:
        strategy = self.strategy
        if strategy.args.plugin in GEMINI_PLUGINS:
            strategy.booster.save_optimizer(strategy.optimizer, str(directory), shard=True)
            return
        if not self._writes_shard():
            return
        tensors, steps = {}, {}
        for name, (_, master) in self._master_weights().items():
            tensors[f"{name}/master"] = master.detach().contiguous().cpu()
            moments = strategy.optimizer.optim.state.get(master, {})
            for moment in _MOMENTS:
                if moment in moments:
                    tensors[f"{name}/{moment}"] = moments[moment].detach().contiguous().cpu()
            if "step" in moments:
                steps[name] = float(moments["step"])
        scaler = strategy.loss_scale_state()
        metadata = {"steps": json.dumps(steps), "scaler": json.dumps(scaler)}
        path = directory / self._shard_name()
        try:
            save_file(tensors, path, metadata=metadata)
        except Exception as error:
            raise OSError(None, str(error), str(path)) from error
        _sync_file(path)

    def _read_optimizer(self, directory: Path) -> None:
        strategy = self.strategy
        if strategy.args.plugin in GEMINI_PLUGINS:
            strategy.booster.load_optimizer(strategy.optimizer, str(directory))
            return
        with safe_open(directory / self._shard_name(), framework="pt") as file:
            keys = set(file.keys())
            steps = json.loads(file.metadata()["steps"])
            for name, (_, master) in self._master_weights().items():
                with torch.no_grad():
                    master.copy_(file.get_tensor(f"{name}/master"))
                moments: dict[str, Any] = {
                    moment: file.get_tensor(f"{name}/{moment}").to(master.device)
                    for moment in _MOMENTS
                    if f"{name}/{moment}" in keys
                }
                if name in steps:
                    moments["step"] = strategy.optimizer_step_count(steps[name], master)
                if moments:
                    strategy.optimizer.optim.state[master] = moments
            strategy.load_loss_scale_state(json.loads(file.metadata()["scaler"]))

    def _remove_old(self, keep: Path) -> None:
        if not self.save_total_limit:
            return
        for checkpoint in list_checkpoints(self.save_dir)[: -self.save_total_limit]:
            if checkpoint != keep:
                # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
                doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
                checkpoint.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)


def _finish(aside: Path, target: Path) -> None:
    """Lists all files with size and checksum, makes them durable, and gives the directory its name."""
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    listing = {}
    for path in files:
        _sync_file(path)
        listing[str(path.relative_to(aside))] = [path.stat().st_size, _crc32(path)]
    write_json(aside / COMPLETE_FILE, listing)
    for directory in {path.parent for path in files} | {aside}:
        sync_directory(directory)
    if target.exists():
        shutil.rmtree(target)
    aside.rename(target)
    sync_directory(target.parent)


def _write_weight_index(directory: Path, location: dict[str, tuple[str, int]]) -> None:
    """One file gets the name that needs no index; several get the index that `from_pretrained` reads."""
    files = {file for file, _ in location.values()}
    if len(files) == 1:
        (directory / files.pop()).rename(directory / "model.safetensors")
        return
    write_json(
        directory / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(size for _, size in location.values())},
            "weight_map": {name: file for name, (file, _) in sorted(location.items())},
        },
    )


def _sync_file(path: Path) -> None:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _write_configs(strategy: Strategy, directory: Path) -> None:
    """Config with the dtype that the weights have, and the generation config of the source."""
    config = strategy.causal_lm.config
    config.torch_dtype = strategy.parameter_dtype
    config.architectures = ["LlamaForCausalLM"]
    config.use_cache = True
    config.save_pretrained(directory)
    strategy.causal_lm.generation_config.save_pretrained(directory)


def _save_lora(strategy: Strategy, directory: Path) -> None:
    peft_model = strategy.peft_model
    if not strategy.args.merge_lora:
        peft_model.save_pretrained(directory)
        return
    from peft.tuners.lora import LoraLayer

    merged = {}
    for name, module in strategy.causal_lm.named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            delta = module.get_delta_weight("default")
            merged[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    state = {}
    for name, tensor in strategy.causal_lm.state_dict().items():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer", "")
        state[name] = merged.get(name, tensor).detach().contiguous().cpu()
    if strategy.causal_lm.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def _save_rng(path: Path) -> None:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)


def _load_rng(path: Path) -> None:
    # Our own file, not a stranger's: it holds numpy arrays and tuples, which weights_only loading refuses.
    state = torch.load(path, weights_only=False)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
