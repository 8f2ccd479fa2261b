"""The weighted mean of models, a tensor at a time.

Every tensor but the embeddings is the mean over all models. A row of the embeddings is the mean over the
models that have its token, with their weights scaled to a sum of 1:

    base, 3 tokens   weight 1      a1 b1 c1
    extended, 5      weight 3      a2 b2 c2 d2 e2
    merged                         (a1 + 3 a2) / 4 …   d2 e2
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from colossal_llama.model.dtypes import is_float
from colossal_llama.model.model_extension import (
    EMBEDDING,
    OUTPUT_HEAD,
    ModelLayout,
    all_finite,
    check_embeddings,
    read_layout,
)
from colossal_llama.model.weight_files import (
    CHUNK_BYTES,
    BinShard,
    SafetensorsShard,
    TensorInfo,
    find_shards,
    open_shard,
    write_header,
    write_tensor,
)
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import with_filename_in_errors
from colossal_llama.utils.messages import cap_problems

if TYPE_CHECKING:
    import torch

MAX_LISTED = 5
# Frequencies that old checkpoints hold: no program reads them, and not all models of a family have them.
_NEVER_READ = "rotary_emb.inv_freq"
# What may differ in `config.json`: the vocabulary and its special tokens are compared by the tokenizers, and
# the rest changes nothing that is computed with the weights.
_FREE_SETTINGS = frozenset(
    (
        *("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype"),
        *("transformers_version", "_name_or_path", "use_cache", "initializer_range", "attention_dropout"),
    )
)


@dataclass(frozen=True)
class MergedModel:
    """A model that takes part.

    Attributes:
        weight: its share of the mean where all models take part.
        config: all settings, those that the file leaves out among them.
        tokens: id -> token.
        rows: of its embeddings.
    """

    directory: Path
    weight: float
    config: Mapping[str, Any]
    tokens: Mapping[int, str]
    layout: ModelLayout
    rows: int

    @property
    def is_tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that matters, by name; a copy of a tied matrix does not."""
        return {
            name: tensor
            for tensors in self.layout.shards.values()
            for name, tensor in tensors.items()
            if not name.endswith(_NEVER_READ) and not (self.is_tied and name == OUTPUT_HEAD)
        }


def open_model(directory: Path, weight: float) -> MergedModel:
    """Reads everything of a model but its weights.

    Raises:
        UserError: it is no complete LLaMA with its tokenizer.
    """
    from colossal_llama.model.model_config import load_model_config
    from colossal_llama.tokenizer.subtokens import token_table
    from colossal_llama.tokenizer.tokenizer_files import read_tokenizer_files

    config = load_model_config(str(directory), f"--models {directory}", trust_remote_code=False).to_dict()
    layout = read_layout(find_shards(directory, "--models"))
    rows, _ = check_embeddings(layout, bool(config.get("tie_word_embeddings")), directory)
    tokens = token_table(read_tokenizer_files(directory, "--models"))
    if max(tokens) >= rows:
        raise UserError(
            f"--models {directory}: its tokenizer has ids up to {max(tokens):,}, its embeddings {rows:,} "
            "rows; give a model with its own tokenizer"
        )
    return MergedModel(directory, weight, config, tokens, layout, rows)


def find_widest(models: Sequence[MergedModel]) -> MergedModel:
    """The last of the models with the largest vocabulary: the merged one has its tokenizer and settings."""
    largest = max(len(model.tokens) for model in models)
    return [model for model in models if len(model.tokens) == largest][-1]


def find_differences(models: Sequence[MergedModel], widest: MergedModel) -> list[str]:
    """Why the models have no common mean, as messages; none if they have."""
    problems = []
    for model in models:
        where = f"--models {model.directory}"
        conflicts = [
            f"{where}: id {token_id} is {token!r}, in {widest.directory} "
            + (repr(widest.tokens[token_id]) if token_id in widest.tokens else "it is missing")
            for token_id, token in sorted(model.tokens.items())
            if widest.tokens.get(token_id) != token
        ]
        if conflicts:
            problems += cap_problems(conflicts, "such ids", MAX_LISTED)
            problems.append(
                f"{where}: neither the same vocabulary as {widest.directory} nor one that it extends; merge "
                "models of one vocabulary, or a base and models of one extension of it"
            )
        problems += [
            f"{where}: {name} is {model.config.get(name)!r}, in {widest.directory} "
            f"{widest.config.get(name)!r}; only models of one configuration have a mean"
            for name in sorted({*model.config, *widest.config} - _FREE_SETTINGS)
            if model.config.get(name) != widest.config.get(name)
        ]
        problems += _find_other_tensors(model, widest, where)
    return problems


def _find_other_tensors(model: MergedModel, widest: MergedModel, where: str) -> list[str]:
    ours, theirs = model.tensors(), widest.tensors()
    problems = [
        f"{where}: {'lacks' if name in theirs else 'has'} the tensor {name}, other than {widest.directory}"
        for name in sorted(ours.keys() ^ theirs.keys())
    ]
    for name in sorted(ours.keys() & theirs.keys()):
        tensor, other = ours[name], theirs[name]
        first = 1 if name in (EMBEDDING, OUTPUT_HEAD) else 0
        if not is_float(tensor.dtype):
            problems.append(
                f"{where}: {name} is {tensor.dtype}; fp32, fp16 or bf16 is needed, so merge before "
                "quantization"
            )
        elif tensor.shape[first:] != other.shape[first:]:
            problems.append(
                f"{where}: {name} is {list(tensor.shape)}, in {widest.directory} {list(other.shape)}"
            )
    return cap_problems(problems, "such tensors", MAX_LISTED)


def find_other_dtypes(models: Sequence[MergedModel], widest: MergedModel) -> list[str]:
    """Tensors whose dtype is not the same in all models."""
    wanted = widest.tensors()
    problems = [
        f"--models {model.directory}: {name} is {tensor.dtype}, in {widest.directory} {wanted[name].dtype}; "
        "choose the dtype of the merged model with --dtype"
        for model in models
        for name, tensor in model.tensors().items()
        if name in wanted and tensor.dtype != wanted[name].dtype
    ]
    return cap_problems(problems, "such tensors", 1)


def plan_row_groups(models: Sequence[MergedModel], widest: MergedModel) -> list[tuple[int, int, list[int]]]:
    """`(start, stop, models)`: which models the rows of the merged embeddings are the mean of, in order.

    A row without a token (padding) is the mean over the models that have it as padding too.
    """
    groups: list[tuple[int, int, list[int]]] = []
    for row in range(max(model.rows for model in models if len(model.tokens) == len(widest.tokens))):
        with_row = [
            number
            for number, model in enumerate(models)
            if row < model.rows and (row in model.tokens) == (row in widest.tokens)
        ]
        if groups and groups[-1][2] == with_row:
            groups[-1] = (groups[-1][0], row + 1, with_row)
        else:
            groups.append((row, row + 1, with_row))
    return groups


class Merger:
    """Writes the shards of the merged model, which are those of `widest`.

    Args:
        dtype: safetensors dtype of all tensors; None keeps each one's own.
    """

    def __init__(self, models: Sequence[MergedModel], widest: MergedModel, dtype: str | None) -> None:
        self.models, self.widest, self.dtype = models, widest, dtype
        self.row_groups = plan_row_groups(models, widest)
        self.num_rows = self.row_groups[-1][1]
        self._places = [
            {name: path for path, tensors in model.layout.shards.items() for name in tensors}
            for model in models
        ]
        self._open: dict[Path, SafetensorsShard | BinShard] = {}

    def __enter__(self) -> Merger:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._close_shards()

    def tensors_of(self, shard: Path) -> list[TensorInfo]:
        """What is written for a shard of `widest`."""
        wanted = self.widest.tensors()
        return [
            TensorInfo(
                tensor.name,
                self.dtype or tensor.dtype,
                (self.num_rows, tensor.shape[1]) if tensor.name in (EMBEDDING, OUTPUT_HEAD) else tensor.shape,
            )
            for tensor in self.widest.layout.shards[shard].values()
            if tensor.name in wanted
        ]

    def write_shard(self, shard: Path, target: Path, advance: Callable[[int], Any]) -> list[TensorInfo]:
        """Writes the means for a shard of `widest` aside, then renames the file; returns its tensors."""
        aside = target.with_name(f".{target.name}.tmp")  # what a killed run left of it is overwritten
        written = self.tensors_of(shard)
        try:
            with with_filename_in_errors(target), open(aside, "wb") as output:
                write_header(written, output)
                for tensor in written:
                    self._write_mean(tensor, output)
                    advance(tensor.num_bytes)
                output.flush()
                os.fsync(output.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
            self._close_shards()
        return written

    def _write_mean(self, tensor: TensorInfo, output: BinaryIO) -> None:
        from colossal_llama.model.dtypes import torch_dtype

        is_embedding = tensor.name in (EMBEDDING, OUTPUT_HEAD)
        width = tensor.shape[1] if is_embedding else 1
        everyone = list(range(len(self.models)))
        groups = self.row_groups if is_embedding else [(0, tensor.num_elements, everyone)]
        step = max(1, CHUNK_BYTES // (4 * width))
        for start, stop, numbers in groups:
            for first in range(start, stop, step):
                last = min(first + step, stop)
                mean = self._mean(tensor.name, first * width, last * width, numbers)
                converted = mean.to(torch_dtype(tensor.dtype))
                if not all_finite(converted):
                    raise UserError(
                        f"{tensor.name}: its mean is not finite in {tensor.dtype}: a model holds such "
                        "values, or --dtype is too small for them"
                    )
                write_tensor(converted, output)

    def _mean(self, name: str, start: int, stop: int, numbers: Sequence[int]) -> torch.Tensor:
        """The weighted mean of some elements in fp32: [stop - start].

        As the first model's values plus weighted differences to them: equal models are their own mean.
        """
        total = sum(self.models[number].weight for number in numbers)
        first, *others = numbers
        base = self._read(first, name, start, stop)
        mean = base.clone()
        for number in others:
            difference = self._read(number, name, start, stop).sub_(base)
            mean.add_(difference, alpha=self.models[number].weight / total)
        return mean

    def _read(self, number: int, name: str, start: int, stop: int) -> torch.Tensor:
        path = self._places[number][name]
        if path not in self._open:
            self._open[path] = open_shard(path)
        return self._open[path].read(name, start, stop).float()

    def _close_shards(self) -> None:
        for shard in self._open.values():
            shard.close()
        self._open.clear()
