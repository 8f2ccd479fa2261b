"""The optimizer on disk: one safetensors file for each shard, and how shards of one layout become another's.

Every file holds, for each parameter that trains, `<name>/master` (fp32) and Adam's `<name>/exp_avg` and
`<name>/exp_avg_sq`: flat slices under ZeRO, else whole. Its metadata say what part of the parameter the shard
belongs to, so that any layout can put the parts together again:

    parameter   --split along `dim` over tensor-parallel ranks-->   part   --flattened, padded, cut-->   slice

Slices have one length and the order of their files, unless their metadata say where each begins and how long
it is (Gemini, which cuts at the borders of chunks: a file holds slices of some parameters only).
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from colossal_llama.training.checkpoint.files import FileJobs
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from colossal_llama.training.plugins.base import Plugin

OPTIMIZER_DIRECTORY = "optimizer"
_KINDS = ("master", "exp_avg", "exp_avg_sq")


def add_optimizer(plan: FileJobs, plugin: Plugin) -> None:
    """Adds this process's shard to the plan, unless another process holds the same and writes it."""
    place = plugin.shard_coordinates()
    if place.is_replica:
        return
    tensors, steps, parts = {}, {}, {}
    for name, (parameter, master) in plugin.master_weights().items():
        parts[name] = describe_part(plugin, parameter, master)
        tensors[f"{name}/master"] = plan.hold(master)
        moments = plugin.optimizer.optim.state.get(master, {})
        for kind in _KINDS[1:]:
            if kind in moments:
                tensors[f"{name}/{kind}"] = plan.hold(moments[kind])
        if "step" in moments:
            steps[name] = float(moments["step"])
    metadata = {"parts": parts, "steps": steps, "scaler": plugin.loss_scale_state()}
    plan.add_tensors(
        f"{OPTIMIZER_DIRECTORY}/{place.file_name}",
        tensors,
        {key: json.dumps(value) for key, value in metadata.items()},
    )


def describe_part(plugin: Plugin, parameter: torch.nn.Parameter, master: torch.Tensor) -> dict[str, Any]:
    """What the metadata of a file say of a parameter."""
    part = {"shape": list(parameter.shape), "dim": tensor_parallel_dim(parameter)}
    offset = plugin.slice_offset(parameter)
    return part if offset is None else {**part, "offset": offset, "length": master.numel()}


def tensor_parallel_dim(parameter: torch.nn.Parameter) -> int | None:
    """The dimension that is split over the tensor-parallel ranks; None when every rank holds the whole."""
    from colossalai.tensor.d_tensor.api import get_sharding_spec, is_distributed_tensor

    if not is_distributed_tensor(parameter):
        return None
    return next(iter(get_sharding_spec(parameter).dim_partition_dict), None)


def read_own_shard(directory: Path, plugin: Plugin) -> None:
    """Restores the optimizer from the shard that this process's place wrote: the same layout, exactly.

    Slices that the layout cuts in another way now are put together from all shards, exactly too.

    Raises:
        UserError: there is no such shard.
    """
    path = directory / plugin.shard_coordinates().file_name
    if not path.is_file():
        raise UserError(f"{path}: is missing; start a new stage from the checkpoint's modeling directory")
    with safe_open(path, framework="pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
        if _cuts_differently(plugin, metadata.get("parts", {})):
            read_other_layout(directory, plugin)
            return
        keys = set(file.keys())
        for name, (_, master) in plugin.master_weights().items():
            values = {kind: file.get_tensor(f"{name}/{kind}") for kind in _KINDS if f"{name}/{kind}" in keys}
            _restore(plugin, master, values, metadata["steps"].get(name))
        plugin.load_loss_scale_state(metadata["scaler"])


def _cuts_differently(plugin: Plugin, saved_parts: dict[str, dict[str, Any]]) -> bool:
    """Whether slices with a place of their own are others than those that a file holds."""
    return any(
        plugin.slice_offset(parameter) is not None
        and saved_parts.get(name) != describe_part(plugin, parameter, master)
        for name, (parameter, master) in plugin.master_weights().items()
    )


def read_other_layout(directory: Path, plugin: Plugin) -> None:
    """Restores the optimizer from the shards of any layout."""
    saved = SavedOptimizer(directory)
    place = plugin.shard_coordinates()
    for name, (parameter, master) in plugin.master_weights().items():
        dim, begin = tensor_parallel_dim(parameter), plugin.slice_begin(parameter, master)
        values = {
            kind: cut_slice(
                cut_part(saved.whole(name, kind), tuple(parameter.shape), dim, place.tensor_rank),
                begin,
                master.numel(),
            ).view(master.shape)
            for kind in _KINDS
            if saved.has(name, kind)
        }
        _restore(plugin, master, values, saved.steps.get(saved.known_as(name)))
    plugin.load_loss_scale_state(saved.scaler)


def _restore(
    plugin: Plugin, master: torch.Tensor, values: dict[str, torch.Tensor], steps: float | None
) -> None:
    with torch.no_grad():
        master.copy_(values["master"])
    moments: dict[str, Any] = {kind: values[kind].to(master.device) for kind in _KINDS[1:] if kind in values}
    if steps is not None:
        moments["step"] = plugin.optimizer_step_count(steps, master)
    if moments:
        plugin.optimizer.optim.state[master] = moments


class SavedOptimizer:
    """All shards of a checkpoint's optimizer, put together one tensor at a time."""

    def __init__(self, directory: Path) -> None:
        self.steps: dict[str, float] = {}
        self.scaler: dict[str, float] = {}
        # name -> tensor-parallel rank -> ZeRO rank -> (file, what it says of this part)
        self._files: dict[str, dict[int, dict[int, tuple[Any, dict[str, Any]]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        for path in sorted(directory.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            metadata = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
            if "parts" not in metadata:
                raise UserError(
                    f"{path}: does not say which parts it holds; resume on the layout that saved it"
                )
            self.steps.update(metadata["steps"])
            self.scaler = metadata["scaler"] or self.scaler
            place = dict(item.rsplit("-", 1) for item in path.stem.split("_"))
            for name, part in metadata["parts"].items():
                self._files[name][int(place["tp"])][int(place["zero"])] = (file, part)
        if not self._files:
            raise UserError(f"{directory}: holds no optimizer files")

    def known_as(self, name: str) -> str:
        """The name a parameter was saved under: a tied output matrix is the input embedding."""
        if name not in self._files and name.endswith("lm_head.weight"):  # "base_model.model.…" with LoRA
            return name.replace("lm_head.weight", "model.embed_tokens.weight")
        return name

    def has(self, name: str, kind: str) -> bool:
        shards = self._files.get(self.known_as(name))
        if shards is None:
            return False
        file, _ = next(iter(next(iter(shards.values())).values()))
        return f"{self.known_as(name)}/{kind}" in file.keys()  # noqa: SIM118 - not a dict

    def whole(self, name: str, kind: str) -> torch.Tensor:
        """The whole tensor; rows that pad a vocabulary are still there."""
        name = self.known_as(name)
        if name not in self._files:
            raise UserError(f"the checkpoint's optimizer does not have {name}; start a new stage instead")
        parts = []
        for _, slices in sorted(self._files[name].items()):
            described = [part for _, (_, part) in sorted(slices.items())]
            shape, dim = described[0]["shape"], described[0]["dim"]
            pieces = [file.get_tensor(f"{name}/{kind}") for _, (file, _) in sorted(slices.items())]
            parts.append(join_slices(pieces, [part.get("offset") for part in described], shape))
            if dim is None:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def join_slices(
    slices: Sequence[torch.Tensor], offsets: Sequence[int | None], shape: Sequence[int]
) -> torch.Tensor:
    """A part of `shape` from its slices.

    Args:
        offsets: where each slice begins; None where they follow one another, the last ones padded.
    """
    size = math.prod(shape)
    if all(offset is None for offset in offsets):
        return torch.cat([piece.flatten() for piece in slices])[:size].view(*shape)
    assert sum(piece.numel() for piece in slices) == size, "slices overlap, or leave gaps"
    joined = slices[0].new_empty(size)
    for piece, offset in zip(slices, offsets, strict=True):
        joined[offset : offset + piece.numel()] = piece.flatten()
    return joined.view(*shape)


def cut_part(whole: torch.Tensor, shape: tuple[int, ...], dim: int | None, rank: int) -> torch.Tensor:
    """Tensor-parallel rank `rank`'s part of `whole`, of shape `shape`.

    Vocabularies may be padded differently in the two layouts: rows are cut off or added as zeros. No row that
    is cut off was ever trained, since no token has its number.
    """
    axis = 0 if dim is None else dim
    start = 0 if dim is None else rank * shape[axis]
    available = max(0, min(shape[axis], whole.size(axis) - start))
    part = whole.narrow(axis, min(start, whole.size(axis)), available)
    if available == shape[axis]:
        return part
    padding = part.new_zeros([size if i != axis else shape[axis] - available for i, size in enumerate(shape)])
    return torch.cat([part, padding], dim=axis)


def cut_slice(part: torch.Tensor, begin: int, size: int) -> torch.Tensor:
    """`size` values of a part from `begin` on; the last slices may run over its end (zeros)."""
    piece = part.flatten()[begin : begin + size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))
