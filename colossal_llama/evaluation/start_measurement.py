"""Bits per byte at step 0 for every way to start new rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colossal_llama.evaluation.comparison import bits_per_byte, bootstrap_intervals, group_documents
from colossal_llama.evaluation.held_out_text import Document
from colossal_llama.evaluation.hidden_states import HiddenStates, find_hidden_states
from colossal_llama.evaluation.new_piece_frequencies import read_corpus, take_windows
from colossal_llama.evaluation.scoring import Scorer
from colossal_llama.evaluation.starts import (
    ExtendedModel,
    cut_for,
    extend_matrix,
    load_extended,
    load_tokenizer,
    score_windows,
    set_rows,
)
from colossal_llama.evaluation.windows import TextEncoder
from colossal_llama.model.output_calibration import calibrate, token_losses
from colossal_llama.utils.console import progress_bar
from colossal_llama.utils.errors import UserError

SAMPLE_CONTEXT_BYTES = 2048


@dataclass(frozen=True)
class Start:
    """A start and what it gives.

    Attributes:
        tied: whether input and output rows are one matrix, as in the base.
        bits_per_byte: of each set.
        change: of each set against mean rows for both, with its 95 % interval over documents.
    """

    init_input: str
    init_output: str
    calibrated: bool
    tied: bool
    bits_per_byte: dict[str, float]
    change: dict[str, tuple[float, float, float] | None]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Measured:
    """All starts, in the order in which they were tried, and the base with its own tokenizer."""

    base: dict[str, float]
    starts: list[Start]
    num_documents: dict[str, int]
    num_positions: int


def measure_starts(
    source: Path,
    tokenizer_dir: Path,
    corpus_dirs: list[Path],
    documents: list[Document],
    input_ways: Sequence[str],
    output_ways: Sequence[str],
    num_positions: int,
    dtype: str,
    device: str,
    seed: int,
) -> Measured:
    """Tries every combination.

    Raises:
        UserError: the source is not the base of the tokenizer, or something can't be loaded.
    """
    extended = load_extended(source, tokenizer_dir, input_ways[0], input_ways[0], dtype, device)
    if not extended.plan.subtokens:
        raise UserError(
            f"--source_model_and_tokenizer_path {source}: is extended already; give the base model"
        )
    model, plan = extended.model, extended.plan
    base_input = extended.base_input
    base_output = extended.base_output
    assert base_input is not None
    assert base_output is not None
    num_documents = len(documents)

    set_rows(model.get_input_embeddings(), base_input)
    set_rows(model.get_output_embeddings(), base_output)
    own = TextEncoder(load_tokenizer(source), str(source), "--source_model_and_tokenizer_path")
    base = score_windows(Scorer(model), cut_for(own, documents, "base"), num_documents, "base")

    corpus = read_corpus(corpus_dirs, extended.encoder, extended.new_rows, num_positions, seed)
    sample = take_windows(corpus.texts, extended.encoder, num_positions, SAMPLE_CONTEXT_BYTES)
    windows = cut_for(extended.encoder, documents, "extended")
    # Rows that are not new, and the new rows of each way: of a 7B, 0.3 GB for each way in bf16.
    head = extend_matrix(base_output, plan, output_ways[0])
    new_output = {way: extended.make_new_rows(base_output, way) for way in output_ways}
    losses: dict[tuple[str, str, bool], np.ndarray] = {}
    num_sampled = 0
    for input_way in input_ways:
        matrix = extend_matrix(base_input, plan, input_way)
        set_rows(model.get_input_embeddings(), matrix)
        # Calibrated rows of a tied model are read as well: the text is seen once more.
        again = windows if extended.base_tied and input_way in output_ways else []
        total = sum(len(window.ids) for window in (*sample, *windows, *again))
        with progress_bar(total=total, desc=f"input rows: {input_way}", unit=" tokens") as bar:
            seen = find_hidden_states(model, sample, bar.update)
            text = find_hidden_states(model, windows, bar.update)
            num_sampled = len(seen.states)
            of_sample = extended.normalizers_of_old(head, seen.states)
            of_text = extended.normalizers_of_old(head, text.states)
            for output_way, rows in new_output.items():
                found = calibrate(seen.states, rows, of_sample, corpus.frequencies())
                shift = (found.biases[:, None] * found.direction).to(rows.device)
                shifted = (rows.float() + shift).to(rows.dtype)
                losses[input_way, output_way, False] = _document_losses(
                    extended, text, base_output, rows, of_text, num_documents
                )
                if again and input_way == output_way:
                    matrix[extended.new_rows.start : extended.new_rows.stop] = shifted
                    read = find_hidden_states(model, windows, bar.update)
                    of_read = extended.normalizers_of_old(head, read.states)
                else:
                    read, of_read = text, of_text
                losses[input_way, output_way, True] = _document_losses(
                    extended, read, base_output, shifted, of_read, num_documents
                )
    return _summarise(documents, base, losses, extended, num_sampled)


def _document_losses(
    extended: ExtendedModel,
    text: HiddenStates,
    base_output: torch.Tensor,
    new: torch.Tensor,
    old_normalizers: torch.Tensor,
    num_documents: int,
) -> np.ndarray:
    found = token_losses(text.states, text.targets, base_output, new, extended.new_rows, old_normalizers)
    return np.bincount(text.documents, weights=found.cpu().numpy(), minlength=num_documents)


def _summarise(
    documents: list[Document],
    base: np.ndarray,
    losses: dict[tuple[str, str, bool], np.ndarray],
    extended: ExtendedModel,
    num_positions: int,
) -> Measured:
    groups = [group for group in group_documents(documents) if group.category is None]
    num_bytes = np.array([document.num_bytes for document in documents], dtype=np.float64)
    reference = losses.get(("mean", "mean", False), next(iter(losses.values())))
    figures: dict[tuple[str, str, bool], tuple[dict, dict]] = {key: ({}, {}) for key in losses}
    bits_of_base = {}
    for group in groups:
        chosen = group.documents
        size = num_bytes[chosen].sum()
        bits_of_base[group.set] = bits_per_byte(base[chosen].sum(), size)
        differences = np.stack([values[chosen] - reference[chosen] for values in losses.values()])
        intervals = bootstrap_intervals(differences, num_bytes[chosen])
        for key, difference, interval in zip(losses, differences, intervals, strict=True):
            bits, changes = figures[key]
            bits[group.set] = bits_per_byte(losses[key][chosen].sum(), size)
            change = bits_per_byte(difference.sum(), size)
            changes[group.set] = None if interval is None else (change, *interval)
    starts = [
        Start(*key, extended.base_tied and key[0] == key[1], bits, changes)
        for key, (bits, changes) in figures.items()
    ]
    return Measured(
        bits_of_base, starts, {group.set: len(group.documents) for group in groups}, num_positions
    )
