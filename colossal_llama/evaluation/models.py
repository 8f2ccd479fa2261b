"""The models of a comparison: found, checked against the text, loaded one after the other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama.evaluation.held_out_text import Document, documents_digest
from colossal_llama.evaluation.new_rows import NewPieces, find_new_pieces
from colossal_llama.evaluation.scoring import Scorer, find_rows_beyond_base
from colossal_llama.evaluation.windows import TextEncoder, Window, cut_documents
from colossal_llama.inference.loading import (
    find_base,
    find_context_length,
    load_model,
    load_tokenizer,
    resolve_device,
)
from colossal_llama.inference.settings import ModelSettings, model_name
from colossal_llama.model.model_config import load_model_config
from colossal_llama.training.checkpoint.directories import list_checkpoints
from colossal_llama.training.checkpoint.modeling_files import MODELING_DIRECTORY
from colossal_llama.training.settings import OutputSettings
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

FLAG = "--models"
LATEST = "latest"


@dataclass(frozen=True)
class ModelFiles:
    """A model by its name in tables, and where it is: a directory, or a name on the hub."""

    name: str
    path: str


@dataclass(frozen=True)
class PreparedModel:
    """What a model sees of the documents.

    Attributes:
        base: the model itself, or of an adapter what it was trained on.
        windows: of all documents, in their order.
        num_tokens: of each document's whole text, without BOS and EOS.
        new_rows: output rows that the first model of the comparison does not have; empty where this is no
            extension of it.
        pieces: the tokens of those rows; None where this is no extension, or the first model itself.
        used: all rows that occur in the text.
        digest: of the text, and of how it was cut.
    """

    files: ModelFiles
    base: str
    config: PretrainedConfig
    windows: list[Window]
    num_tokens: np.ndarray
    new_rows: list[int]
    pieces: NewPieces | None
    used: frozenset[int]
    digest: str

    @property
    def num_used_rows(self) -> int:
        """How many of the new rows occur in the text."""
        return len(self.used.intersection(self.new_rows))

    def facts(self, dtype: str, device: str) -> dict[str, Any]:
        """What the scores depend on, JSON-able."""
        return {
            "model": _identity(self.files.path, self.config),
            "base": _identity(self.base, self.config),
            "new_rows": hashlib.sha256(str(self.new_rows).encode()).hexdigest(),
            "text": self.digest,
            "dtype": dtype,
            "device": resolve_device(device).type,
        }

    def sum_by_document(self, values: Sequence[float]) -> np.ndarray:
        """Sums of a value of each window, float64 [documents]."""
        documents = [window.document for window in self.windows]
        return np.bincount(documents, weights=values, minlength=len(self.num_tokens))


def find_models(names: Sequence[str]) -> list[ModelFiles]:
    """The models of `--models`; `latest` and directories of checkpoints lead to the weights in them.

    Raises:
        UserError: there is no checkpoint.
    """
    paths, problems = [], []
    for name in names:
        try:
            paths.append(_find_model(name))
        except (UserError, ValueError) as error:
            problems.append(f"{FLAG} {name}: {error}")
    if problems:
        raise UserError(problems)
    return [ModelFiles(name, path) for name, path in zip(_names(paths), paths, strict=True)]


def _find_model(name: str) -> str:
    path = Path(name)
    if path.name == LATEST and not path.exists():
        save_dir = path.parent if len(path.parts) > 1 else OutputSettings().save_dir
        checkpoints = list_checkpoints(save_dir)
        if not checkpoints:
            raise UserError(f"no complete checkpoint in {save_dir}; give its --save_dir as <save_dir>/latest")
        path = checkpoints[-1]
    if not (path / "config.json").is_file() and (path / MODELING_DIRECTORY).is_dir():
        path = path / MODELING_DIRECTORY
    return model_name(str(path))


def _names(paths: Sequence[str]) -> list[str]:
    """Short names: of directories, the path below what they share, without a last `modeling`."""
    places = [Path(os.path.abspath(path)) if Path(path).is_dir() else None for path in paths]
    bare = [
        place.parent if place is not None and place.name == MODELING_DIRECTORY else place for place in places
    ]
    parents = {place.parent for place in bare if place is not None}
    common = Path(os.path.commonpath(parents)) if parents else None
    names: list[str] = []
    for path, place in zip(paths, bare, strict=True):
        name = path if place is None or common is None else place.relative_to(common).as_posix()
        count = sum(other.split(" (")[0] == name for other in names)
        names.append(f"{name} ({count + 1})" if count else name)
    return names


def prepare_models(
    models: Sequence[ModelFiles], documents: Sequence[Document], context_bytes: int, stride_bytes: int
) -> list[PreparedModel]:
    """Cuts the documents for each model.

    Raises:
        UserError: naming all models that can't be used, or whose positions the windows exceed.
    """
    prepared: list[PreparedModel] = []
    problems: list[str] = []
    first: tuple[PreTrainedTokenizerFast, int] | None = None
    text = f"{documents_digest(documents)} {context_bytes} {stride_bytes}"
    for files in models:
        try:
            base, _ = find_base(files.path, FLAG)
            config = load_model_config(base, f"{FLAG} {base}", trust_remote_code=False)
            if config.model_type != "llama":
                raise UserError(f"{FLAG} {files.path}: is a {config.model_type} model; only llama models")
            tokenizer = load_tokenizer(None, files.path, base, trust_remote_code=False, flag=FLAG)
            encoder = TextEncoder(tokenizer, files.path)
        except UserError as error:
            problems += error.problems
            continue
        first = first or (tokenizer, config.vocab_size)
        vocabularies = first[0].get_vocab(), tokenizer.get_vocab()
        new_rows = find_rows_beyond_base(*vocabularies, first[1], config.vocab_size) or []
        pieces = find_new_pieces(first[0], tokenizer) if new_rows else None
        encoded = encoder.encode(documents, files.name)
        windows = cut_documents(encoded, encoder.bos_id, encoder.eos_id, context_bytes, stride_bytes)
        longest = max(len(window.ids) for window in windows)
        limit = find_context_length(config)
        if longest > limit:
            problems.append(
                f"{FLAG} {files.path}: a window has {longest:,} tokens, the model {limit:,} positions; use "
                f"--context_bytes {context_bytes * limit // longest} or less"
            )
        used = np.unique(np.concatenate([document.ids for document in encoded])).tolist()
        num_tokens = np.array([len(document.ids) for document in encoded], dtype=np.int64)
        prepared.append(
            PreparedModel(files, base, config, windows, num_tokens, new_rows, pieces, frozenset(used), text)
        )
    if problems:
        raise UserError(problems)
    return prepared


def load_scorer(prepared: PreparedModel, dtype: str, device: str) -> Scorer:
    """The model, ready to score."""
    settings = ModelSettings(prepared.files.path, device=device, dtype=dtype)
    return Scorer(load_model(settings, FLAG).model, prepared.new_rows)


def _identity(path: str, config: PretrainedConfig) -> list[Any]:
    """Changes when the files of a model do."""
    directory = Path(path)
    if not directory.is_dir():
        return [path, getattr(config, "_commit_hash", None)]
    files = sorted(file for file in directory.iterdir() if file.is_file())
    facts = [(file.name, (found := file.stat()).st_size, found.st_mtime_ns) for file in files]
    return [os.path.abspath(path), facts]
