"""Writes a model with extended embeddings in one pass over its shards, all else byte for byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from colossal_llama.model.dtypes import is_float, torch_dtype, torch_name
from colossal_llama.model.embedding_extension import RowPlan, mean_of_all_rows
from colossal_llama.model.initializations import DEFAULT_INITIALIZATION
from colossal_llama.model.weight_files import (
    CHUNK_BYTES,
    BinShard,
    SafetensorsShard,
    TensorInfo,
    iterate_chunks,
    open_shard,
    sum_bytes,
    write_header,
    write_tensor,
)
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import with_filename_in_errors

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_HEAD = "lm_head.weight"

# Frequencies of the rotary embedding in old checkpoints: never read, and wrong in half precision.
_ALWAYS_AS_THEY_ARE = ("rotary_emb.inv_freq",)
_NEW_ROWS_PER_STEP = 2048


@dataclass(frozen=True)
class ModelLayout:
    """The source's shards and the tensors in them, read from headers alone.

    Attributes:
        shards: shard file -> its tensors, in the order of their bytes.
    """

    shards: Mapping[Path, Mapping[str, TensorInfo]]

    def find(self, name: str) -> TensorInfo | None:
        return next((tensors[name] for tensors in self.shards.values() if name in tensors), None)


@dataclass(frozen=True)
class RowShift:
    """Biases that are put into output rows: row + bias × direction.

    Attributes:
        rows: the rows, without gaps.
        biases: one for each, fp32.
        direction: [hidden], fp32.
    """

    rows: range
    biases: torch.Tensor
    direction: torch.Tensor

    def of(self, start: int, stop: int) -> torch.Tensor:
        """What is added to rows `start` to `stop`, in fp32."""
        import torch

        wanted = torch.zeros(stop - start)
        first, last = max(start, self.rows.start), min(stop, self.rows.stop)
        if first < last:
            part = slice(first - self.rows.start, last - self.rows.start)
            wanted[first - start : last - start] = self.biases[part]
        return wanted[:, None] * self.direction


@dataclass(frozen=True)
class Extension:
    """What becomes of a model's tensors.

    Attributes:
        plan: the rows of the embeddings.
        dtype: safetensors dtype of the floating-point tensors; None keeps each one's own.
        init_input, init_output: how new rows are made, names in `INITIALIZATIONS`.
        untie: the output head, so far the input embeddings, becomes a matrix of its own.
        shift: what is added to rows of the output head; None for nothing.
        head: the tensor that is the output head, `EMBEDDING` where it is tied.
    """

    plan: RowPlan
    dtype: str | None = None
    init_input: str = DEFAULT_INITIALIZATION
    init_output: str = DEFAULT_INITIALIZATION
    untie: bool = False
    shift: RowShift | None = None
    head: str = OUTPUT_HEAD

    def way(self, name: str) -> str:
        """How new rows of a matrix are made."""
        return self.init_output if name == OUTPUT_HEAD else self.init_input

    def origin(self, name: str) -> str:
        """The source's tensor that a tensor is made from."""
        return EMBEDDING if self.untie and name == OUTPUT_HEAD else name

    def shifts(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """What is added to rows `start` to `stop` of a matrix, in fp32; None for nothing."""
        # A tied model may hold the head as well, as a copy that has to stay one.
        is_head = name in (OUTPUT_HEAD, self.head)
        if (
            self.shift is None
            or not is_head
            or not (start < self.shift.rows.stop and self.shift.rows.start < stop)
        ):
            return None
        return self.shift.of(start, stop)

    def segments(self, name: str) -> list[tuple[str, int, int]]:
        """The rows of a matrix in order: those of the plan, kept ones that are shifted apart as "shifted"."""
        segments = []
        for kind, start, stop in self.plan.segments:
            if kind != "kept" or self.shifts(name, start, stop) is None:
                segments.append((kind, start, stop))
                continue
            assert self.shift is not None
            first, last = max(start, self.shift.rows.start), min(stop, self.shift.rows.stop)
            parts = [("kept", start, first), ("shifted", first, last), ("kept", last, stop)]
            segments += [part for part in parts if part[1] < part[2]]
        return segments

    def targets(self, tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
        """What the tensors of a source shard become."""
        results = []
        for tensor in tensors:
            if self.untie and tensor.name == OUTPUT_HEAD:
                continue  # of a tied model: a copy of the embeddings that nothing reads
            results.append(self._target(tensor))
            if self.untie and tensor.name == EMBEDDING:
                results.append(replace(results[-1], name=OUTPUT_HEAD))
        return results

    def _target(self, tensor: TensorInfo) -> TensorInfo:
        convert = (
            self.dtype is not None
            and is_float(tensor.dtype)
            and not tensor.name.endswith(_ALWAYS_AS_THEY_ARE)
        )
        is_embedding = tensor.name in (EMBEDDING, OUTPUT_HEAD)
        shape = (self.plan.num_rows, tensor.shape[1]) if is_embedding else tensor.shape
        return TensorInfo(tensor.name, self.dtype if convert else tensor.dtype, shape)


def read_layout(shards: list[Path]) -> ModelLayout:
    """Opens every shard once for the list of its tensors.

    Raises:
        UserError: a shard is damaged, or two of them hold a tensor of the same name.
    """
    found: dict[Path, Mapping[str, TensorInfo]] = {}
    home: dict[str, Path] = {}
    for path in shards:
        shard = open_shard(path)
        found[path] = shard.tensors
        shard.close()
        for name in shard.tensors:
            if home.setdefault(name, path) != path:
                raise UserError(f"{path}: tensor {name} is also in {home[name].name}")
    return ModelLayout(found)


def check_embeddings(layout: ModelLayout, tied: bool, directory: Path) -> tuple[int, int]:
    """(rows, hidden size) of the embeddings, which input and output must share.

    Raises:
        UserError: they are missing, quantized, or of different shapes.
    """
    embedding, head = layout.find(EMBEDDING), layout.find(OUTPUT_HEAD)
    if embedding is None:
        raise UserError(f"{directory}: no tensor {EMBEDDING}; only LLaMA models can be extended")
    if head is None and not tied:
        raise UserError(
            f"{directory}: no tensor {OUTPUT_HEAD}, though config.json does not tie the embeddings"
        )
    for tensor in (embedding, head):
        if tensor is not None and (not is_float(tensor.dtype) or len(tensor.shape) != 2):
            raise UserError(
                f"{directory}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}; fp32, fp16 or bf16 "
                "matrices are needed, so start from the model before quantization"
            )
    if head is not None and head.shape != embedding.shape:
        raise UserError(
            f"{directory}: {EMBEDDING} is {list(embedding.shape)}, {OUTPUT_HEAD} {list(head.shape)}; they "
            "must be alike"
        )
    return embedding.shape[0], embedding.shape[1]


def write_shard(
    source: Path,
    target: Path,
    extension: Extension,
    advance: Callable[[int], Any],
) -> list[TensorInfo]:
    """Writes `source`'s tensors to `target` aside, checks the new embeddings, then renames the file.

    Args:
        advance: called with the number of bytes written since the last call.

    Returns:
        The tensors written.
    """
    shard = open_shard(source)
    # A name that a later run uses too: what a killed run left of it is overwritten.
    aside = target.with_name(f".{target.name}.tmp")
    try:
        written = extension.targets(shard.tensors.values())
        with with_filename_in_errors(target), open(aside, "wb") as output:
            write_header(written, output)
            for tensor in written:
                if tensor.name in (EMBEDDING, OUTPUT_HEAD):
                    _write_embedding(shard, tensor, extension, output)
                else:
                    _write_unchanged(shard, tensor, output)
                advance(tensor.num_bytes)
            output.flush()
            os.fsync(output.fileno())
        _check_shard(shard, aside, written, extension)
        os.replace(aside, target)
    finally:
        shard.close()
        aside.unlink(missing_ok=True)
    return written


def _write_unchanged(shard: SafetensorsShard | BinShard, tensor: TensorInfo, output: BinaryIO) -> None:
    source = shard.tensors[tensor.name]
    if source.dtype == tensor.dtype:
        shard.copy(tensor.name, 0, tensor.num_elements, output)
        return
    for chunk in iterate_chunks(source):
        write_tensor(_converted(shard.read(tensor.name, chunk.start, chunk.stop), tensor), output)


def _write_embedding(
    shard: SafetensorsShard | BinShard, tensor: TensorInfo, extension: Extension, output: BinaryIO
) -> None:
    plan, origin = extension.plan, shard.tensors[extension.origin(tensor.name)]
    source_rows, hidden = origin.shape
    matrix = shard.read(origin.name, 0, source_rows * hidden).view(source_rows, hidden)
    for kind, start, stop in extension.segments(tensor.name):
        if kind == "kept" and origin.dtype == tensor.dtype:
            shard.copy(origin.name, start * hidden, stop * hidden, output)
            continue
        for first in range(start, stop, _NEW_ROWS_PER_STEP):
            last = min(first + _NEW_ROWS_PER_STEP, stop)
            if kind in ("kept", "shifted"):
                rows = matrix[first:last]
            elif kind == "new":
                rows = plan.new_rows(matrix, first, last, extension.way(tensor.name))
            else:
                rows = mean_of_all_rows(matrix, plan.num_source_tokens).expand(last - first, hidden)
            if kind != "kept" and (shift := extension.shifts(tensor.name, first, last)) is not None:
                rows = rows.float() + shift
            write_tensor(_converted(rows, tensor), output)


def _converted(values: torch.Tensor, tensor: TensorInfo) -> torch.Tensor:
    """`values` in the tensor's dtype.

    Raises:
        UserError: a finite value is too large for it.
    """
    converted = values.to(torch_dtype(tensor.dtype))
    if not all_finite(converted) and all_finite(values):
        raise UserError(
            f"{tensor.name}: holds values up to {values.abs().max().item():.6g}, too large for "
            f"{torch_name(tensor.dtype)}; choose --dtype bf16 or fp32"
        )
    return converted


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN.

    By the extremes, which NaN passes on to: on CPU some 70 times as fast as `isfinite` in half precision.
    """
    import torch

    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(low.isfinite() and high.isfinite())


def _check_shard(
    shard: SafetensorsShard | BinShard, path: Path, expected: list[TensorInfo], extension: Extension
) -> None:
    """Reads the file back: tensors as planned, kept rows equal to the source's, new rows as they must be."""
    result = SafetensorsShard(path)
    try:
        if list(result.tensors.values()) != expected:
            raise RuntimeError(f"{path}: the tensors read back are not those written; is the disk sound?")
        for tensor in expected:
            if tensor.name in (EMBEDDING, OUTPUT_HEAD):
                _check_embedding(shard, result, tensor, extension)
    finally:
        result.close()


def _check_embedding(
    shard: SafetensorsShard | BinShard, result: SafetensorsShard, tensor: TensorInfo, extension: Extension
) -> None:
    import torch

    plan, way = extension.plan, extension.way(tensor.name)
    origin = shard.tensors[extension.origin(tensor.name)]
    source_rows, hidden = origin.shape
    matrix = shard.read(origin.name, 0, source_rows * hidden).view(source_rows, hidden)
    rows_per_step = max(1, CHUNK_BYTES // (4 * hidden))
    for kind, start, stop in extension.segments(tensor.name):
        for first in range(start, stop, rows_per_step):
            last = min(first + rows_per_step, stop)
            rows = result.read(tensor.name, first * hidden, last * hidden).view(last - first, hidden)
            if kind == "kept":
                kept = matrix[first:last].to(rows.dtype)
                # As bytes: a NaN that the source holds is kept like any other value.
                right = torch.equal(rows.view(torch.uint8), kept.view(torch.uint8))
            else:
                right = all_finite(rows)
            if right and kind in ("new", "shifted"):
                # A few of each step by another way: one row at a time, in float64.
                for row in {first, (first + last) // 2, last - 1}:
                    is_new = kind == "new"
                    alone = plan.new_row_alone(matrix, row, way) if is_new else matrix[row].double()
                    if (shift := extension.shifts(tensor.name, row, row + 1)) is not None:
                        alone = alone + shift[0].double()
                    right = right and _close(rows[row - first], alone)
            if not right:
                raise UserError(
                    f"{tensor.name}: rows {first:,} to {last - 1:,} are not what they should be; "
                    "either the source holds values that are not finite, or the disk is not sound"
                )


def _close(row: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether `row` is `expected` within its own dtype's rounding and fp32's summation."""
    import torch

    step = torch.finfo(row.dtype).eps
    return torch.allclose(
        row.double(),
        expected,
        rtol=step,
        atol=1e-6 * expected.abs().max().item() + torch.finfo(row.dtype).tiny,
    )


def index_of(shards: Mapping[str, list[TensorInfo]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json` for shard name -> tensors."""
    weight_map = {tensor.name: shard for shard, tensors in shards.items() for tensor in tensors}
    total = sum(sum_bytes(tensors) for tensors in shards.values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
