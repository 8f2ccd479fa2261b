"""New rows that a comparison finds unused: never in the text, or hardly moved from where they started.

All of it comes from the tokens of the text and the files of the models; nothing is computed with a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.evaluation.ledger_figures import RowMovement, is_hardly_moved, measure_movement
from colossal_llama.evaluation.models import FLAG, PreparedModel
from colossal_llama.evaluation.new_rows import EmbeddingRows, mean_rows, read_rows
from colossal_llama.model.init_model import INITIALIZATION_FILE
from colossal_llama.utils.console import warn
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from colossal_llama.evaluation.new_rows import NewPieces

MEANS = "means of the base's rows"


@dataclass(frozen=True)
class NewRowsReport:
    """The new pieces of one model that its text or its training did not reach.

    Attributes:
        pieces: number of them all.
        never_in_text: those that the text has not once.
        start: where the rows started from: `MEANS`, or the name of a compared model that init_model.py made,
            which may be this one; None where the rows can't be read.
        hardly_moved: pieces of rows that are where they started; None for a start itself.
    """

    model: str
    pieces: int
    never_in_text: list[str]
    start: str | None = None
    hardly_moved: list[str] | None = None
    median_input_cosine: float | None = None
    median_output_cosine: float | None = None


def report_new_rows(models: Sequence[PreparedModel]) -> list[NewRowsReport]:
    """Of all models that have more tokens than the first and all of its; the first is the base."""
    extended = [model for model in models if model.pieces is not None and model.pieces.texts]
    rows = {model.files.name: found for model in extended if (found := _try_to_read(model)) is not None}
    base = _try_to_read(models[0]) if rows else None
    reports = []
    for model in extended:
        pieces = model.pieces
        assert pieces is not None
        unused = [text for token_id, text in pieces.texts.items() if token_id not in model.used]
        report = NewRowsReport(model.files.name, len(pieces.texts), unused)
        own = rows.get(model.files.name)
        if own is not None and _is_as_made(model):
            report = replace(report, start=model.files.name)
        elif own is not None:
            starts = {
                other.files.name: rows[other.files.name]
                for other in extended
                if _is_as_made(other) and other.files.name in rows and _same_ids(other.pieces, pieces)
            }
            if base is not None:
                starts[MEANS] = mean_rows(base, list(pieces.replaced.values()))
            report = _measure(report, list(pieces.texts.values()), own, starts)
        reports.append(report)
    return reports


def _is_as_made(model: PreparedModel) -> bool:
    """init_model.py wrote it; training does not copy that file."""
    return (Path(model.files.path) / INITIALIZATION_FILE).is_file()


def _same_ids(one: NewPieces | None, other: NewPieces) -> bool:
    return one is not None and one.texts == other.texts


def _measure(
    report: NewRowsReport, texts: Sequence[str], rows: EmbeddingRows, starts: dict[str, EmbeddingRows]
) -> NewRowsReport:
    """Against the nearest of the possible starts, which is the one that the model was trained from."""
    best: tuple[float, str, list[RowMovement], list[RowMovement] | None] | None = None
    for name, start in starts.items():
        if start.input.shape != rows.input.shape:
            continue
        moved = measure_movement(start.input, rows.input)
        moved_output = None
        if start.output is not None and rows.output is not None:
            moved_output = measure_movement(start.output, rows.output)
        distance = sum(row.distance for row in (*moved, *(moved_output or ())))
        if best is None or distance < best[0]:
            best = distance, name, moved, moved_output
    if best is None:
        return report
    _, name, moved, moved_output = best
    pairs = zip(texts, moved, moved_output or [None] * len(moved), strict=True)
    return replace(
        report,
        start=name,
        hardly_moved=[text for text, row, output in pairs if is_hardly_moved(row, output)],
        median_input_cosine=float(np.median([row.cosine for row in moved])),
        median_output_cosine=(
            None if moved_output is None else float(np.median([row.cosine for row in moved_output]))
        ),
    )


def _try_to_read(model: PreparedModel) -> EmbeddingRows | None:
    """The rows of a model's new pieces (of the base, all); None, with a warning, where they can't be read."""
    wanted = None if model.pieces is None else list(model.pieces.texts)
    try:
        rows = read_rows(_directory_of(model.base), FLAG, wanted)
        if model.base != model.files.path:
            rows = _with_adapter(rows, _directory_of(model.files.path), wanted)
    except (UserError, OSError) as error:
        warn(f"{model.files.name}: how far its new rows moved can't be told: {error}")
        return None
    return replace(rows, output=None) if model.config.tie_word_embeddings else rows


def _directory_of(path: str) -> Path:
    """Where the files are; of a name on the hub, in the cache."""
    from transformers.utils import cached_file

    if Path(path).is_dir():
        return Path(path)
    return Path(str(cached_file(path, "config.json"))).parent


def _with_adapter(rows: EmbeddingRows, directory: Path, wanted: Sequence[int] | None) -> EmbeddingRows:
    """An adapter that trained the embeddings has whole matrices of its own."""
    from peft.utils import load_peft_weights

    found = {}
    for name, tensor in load_peft_weights(str(directory), device="cpu").items():
        for kind, ending in (("input", "embed_tokens.weight"), ("output", "lm_head.weight")):
            if name.endswith(f".{ending}"):
                found[kind] = tensor if wanted is None else tensor[list(wanted)]
        if "embed_tokens" in name and "lora_" in name:
            raise UserError("its adapter has a low-rank change of the embeddings; merge it first")
    return replace(rows, **found)
