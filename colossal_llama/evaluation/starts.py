"""An extended model before training, in memory: made from a base model, or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from colossal_llama.evaluation.comparison import bits_per_byte
from colossal_llama.evaluation.held_out_text import Document
from colossal_llama.evaluation.scoring import Scorer, score_batch
from colossal_llama.evaluation.windows import TextEncoder, Window, cut_documents, make_batches
from colossal_llama.inference.loading import load_model
from colossal_llama.inference.settings import ModelSettings
from colossal_llama.model.embedding_extension import RowPlan, mean_of_all_rows, plan_rows
from colossal_llama.model.initializations import DEFAULT_INITIALIZATION
from colossal_llama.model.model_config import read_model_config
from colossal_llama.model.model_extension import (
    EMBEDDING,
    OUTPUT_HEAD,
    Extension,
    ModelLayout,
    RowShift,
    check_embeddings,
    read_layout,
)
from colossal_llama.model.output_calibration import Calibration, normalizers
from colossal_llama.model.weight_files import find_shards
from colossal_llama.tokenizer.loading import load_pretrained_tokenizer
from colossal_llama.tokenizer.new_rows import find_new_rows
from colossal_llama.tokenizer.subtokens import encode_tokens, token_table
from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE, read_tokenizer_files
from colossal_llama.utils.console import progress_bar
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCE, TOKENIZER = "--source_model_and_tokenizer_path", "--target_tokenizer_path"
CONTEXT_BYTES = 8192
BATCH_TOKENS = 4096


@dataclass
class ExtendedModel:
    """A model with its extended tokenizer.

    Attributes:
        model: of transformers, with a row for each token.
        config: the content of `config.json` as it is on disk.
        layout: the tensors on disk, of the base model where it was extended here.
        plan: how its rows came about.
        new_rows: ids of the new pieces.
        tied: whether input and output rows are the same matrix; `base_tied` before the extension.
        base_input, base_output: the matrices before the extension; None where it was extended before.
    """

    model: PreTrainedModel
    config: dict[str, Any]
    layout: ModelLayout
    encoder: TextEncoder
    plan: RowPlan
    new_rows: range
    tied: bool
    init_input: str
    init_output: str
    base_tied: bool
    pieces: Mapping[int, str] = field(repr=False)
    base_input: torch.Tensor | None = field(default=None, repr=False)
    base_output: torch.Tensor | None = field(default=None, repr=False)

    def piece(self, row: int) -> str:
        """The text of a piece, as people read it; parts of characters as escapes."""
        if self.encoder.table is None:
            return self.pieces[row]
        return self.encoder.table.readable(row)

    def output_weight(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight.data

    def new_output_rows(self) -> torch.Tensor:
        return self.output_weight()[self.new_rows.start : self.new_rows.stop]

    def make_new_rows(self, matrix: torch.Tensor, way: str) -> torch.Tensor:
        """The new rows that a way makes of a base matrix, in its dtype and on its device."""
        rows = self.plan.new_rows(matrix.cpu(), self.new_rows.start, self.new_rows.stop, way)
        return rows.to(matrix)

    def old_normalizers(self, hidden: torch.Tensor) -> torch.Tensor:
        """log Σ exp of the logits of all rows that are not new, fp64 [positions]."""
        return self.normalizers_of_old(self.output_weight(), hidden)

    def normalizers_of_old(self, weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The same for an output head that is not (yet) the model's."""
        parts = [weight[: self.new_rows.start], weight[self.new_rows.stop :]]
        found = [normalizers(hidden, part) for part in parts if len(part)]
        return torch.stack(found).logsumexp(0)

    def shift_output(self, calibration: Calibration) -> None:
        """Adds the biases to the new output rows, as the files will have them."""
        rows = self.new_output_rows()
        shift = calibration.biases[:, None] * calibration.direction
        rows.copy_((rows.float() + shift.to(rows.device)).to(rows.dtype))

    def extension(self, shift: RowShift | None = None) -> Extension:
        """What to write."""
        return Extension(
            self.plan,
            init_input=self.init_input,
            init_output=self.init_output,
            untie=self.base_tied and not self.tied,
            shift=shift,
            head=EMBEDDING if self.tied else OUTPUT_HEAD,
        )

    def score(self, documents: list[Document], what: str) -> dict[str, float]:
        """Bits per byte of each set."""
        windows = cut_for(self.encoder, documents, what)
        losses = score_windows(Scorer(self.model), windows, len(documents), what)
        return bits_by_set(documents, losses)


def load_extended(
    source: Path, tokenizer_dir: Path | None, init_input: str, init_output: str, dtype: str, device: str
) -> ExtendedModel:
    """Loads a model; one that has fewer rows than its extended tokenizer has tokens is extended in memory.

    Raises:
        UserError: the tokenizer is no extension, or something can't be loaded.
    """
    where = tokenizer_dir or source
    flag = TOKENIZER if tokenizer_dir else SOURCE
    new_rows = find_new_rows(where)
    if not new_rows:
        reason = "no vocabulary_extension.json, which says what is new"
        if (where / REPORT_FILE).exists():
            reason = f"its {REPORT_FILE} says that nothing was added, so no row is new"
        raise UserError(f"{flag} {where}: {reason}; give an extended tokenizer, made by init_tokenizer.py")
    config = read_model_config(source, f"{SOURCE} {source}")
    layout = read_layout(find_shards(source, SOURCE))
    tied = bool(config.get("tie_word_embeddings", False))
    num_rows, _ = check_embeddings(layout, tied, source)
    own, target = read_tokenizer_files(source, SOURCE), read_tokenizer_files(where, TOKENIZER)
    own_tokens, tokens = token_table(own), token_table(target)
    model = load_model(ModelSettings(str(source), device=device, dtype=dtype), SOURCE).model
    encoder = TextEncoder(load_tokenizer(where), str(where), TOKENIZER)
    base_input = base_output = None
    is_tied = tied
    if own_tokens == tokens and num_rows >= new_rows.stop:
        if init_input != DEFAULT_INITIALIZATION or init_output != DEFAULT_INITIALIZATION:
            raise UserError(
                f"--init_input, --init_output: {SOURCE} {source} has rows for all new pieces already, which "
                "are shifted as they are; leave these flags out, or give the base model"
            )
        plan = RowPlan(num_rows, min(len(tokens), num_rows), [("kept", 0, num_rows)], {})
    else:
        plan = plan_rows(own_tokens, tokens, num_rows, 1, lambda texts: encode_tokens(own, texts))
        new_rows = _all_new_rows(plan, new_rows)
        is_tied = tied and init_input == init_output
        base_input = model.get_input_embeddings().weight.data
        base_output = model.get_output_embeddings().weight.data
        set_rows(model.get_input_embeddings(), extend_matrix(base_input, plan, init_input))
        if is_tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        else:
            model.config.tie_word_embeddings = False
            set_rows(model.get_output_embeddings(), extend_matrix(base_output, plan, init_output))
    return ExtendedModel(
        model,
        config,
        layout,
        encoder,
        plan,
        new_rows,
        is_tied,
        init_input,
        init_output,
        tied,
        tokens,
        base_input,
        base_output,
    )


def _all_new_rows(plan: RowPlan, of_last_extension: range) -> range:
    """Those of earlier extensions too, where the model has rows for none of them."""
    first = of_last_extension.start
    while first - 1 in plan.subtokens:
        first -= 1
    return range(first, of_last_extension.stop)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    return load_pretrained_tokenizer(
        directory,
        lambda error: f"{TOKENIZER} {directory}: no tokenizer can be loaded ({first_line(error)})",
    )


def set_rows(module: nn.Module, matrix: torch.Tensor) -> None:
    """Puts a matrix in the place of the weight of an embedding or an output head."""
    module.weight = nn.Parameter(matrix, requires_grad=False)
    size = "num_embeddings" if isinstance(module, nn.Embedding) else "out_features"
    setattr(module, size, len(matrix))


def extend_matrix(matrix: torch.Tensor, plan: RowPlan, way: str) -> torch.Tensor:
    """The whole matrix with new rows, in its own dtype and on its device."""
    host = matrix.cpu()
    parts = []
    for kind, start, stop in plan.segments:
        if kind == "kept":
            parts.append(host[start:stop])
        elif kind == "new":
            parts.append(plan.new_rows(host, start, stop, way).to(host.dtype))
        else:
            mean = mean_of_all_rows(host, plan.num_source_tokens)
            parts.append(mean.expand(stop - start, -1).to(host.dtype))
    return torch.cat(parts).to(matrix.device)


def cut_for(encoder: TextEncoder, documents: list[Document], what: str) -> list[Window]:
    encoded = encoder.encode(documents, what)
    return cut_documents(encoded, encoder.bos_id, encoder.eos_id, CONTEXT_BYTES, CONTEXT_BYTES)


def score_windows(scorer: Scorer, windows: list[Window], num_documents: int, what: str) -> np.ndarray:
    """Losses in nats of each document, float64 [documents]."""
    losses = np.zeros(num_documents)
    total = sum(len(window.ids) for window in windows)
    with progress_bar(total=total, desc=f"held-out text, {what}", unit=" tokens", unit_scale=True) as bar:
        for batch in make_batches(windows, BATCH_TOKENS):
            chosen = [windows[number] for number in batch]
            for window, score in zip(chosen, score_batch(scorer, chosen), strict=True):
                losses[window.document] += score.loss
            bar.update(sum(len(window.ids) for window in chosen))
    return losses


def bits_by_set(documents: list[Document], losses: np.ndarray) -> dict[str, float]:
    """Bits per byte of each set, in order of appearance."""
    by_set: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        by_set.setdefault(document.set, []).append(number)
    return {
        name: bits_per_byte(losses[numbers].sum(), sum(documents[number].num_bytes for number in numbers))
        for name, numbers in by_set.items()
    }
