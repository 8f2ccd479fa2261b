"""The ledger of new rows: for each new piece of an extended model, what became of it.

How often it occurs in the training data, how far its embedding rows moved, and its loss on held-out text
against that of the tokens that it replaces, under the base model. Writes ledger.json (all pieces) and
ledger.md (the worst and the best).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.inference.settings import device_name, model_name
from colossal_llama.utils.arguments import (
    ArgumentParser,
    directory_list,
    existing_directory,
    non_negative_int,
    positive_int,
)
from colossal_llama.utils.console import log, progress_bar, warn
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.output_checks import why_not_output_directory, why_not_replaceable
from colossal_llama.utils.settings import add_settings, flag, parse_settings

if TYPE_CHECKING:
    import numpy as np
    import torch

    from colossal_llama.evaluation.held_out_text import Document
    from colossal_llama.evaluation.ledger_figures import LedgerEntry, ScoredDocument
    from colossal_llama.evaluation.new_rows import EmbeddingRows, NewPieces

JSON_FILE, MARKDOWN_FILE = "ledger.json", "ledger.md"
# Tokens of a forward pass, padding included.
BATCH_TOKENS = 16384


@dataclass(frozen=True)
class LedgerSettings:
    """An extended model, what it is compared with, and on which text."""

    base_model: str = flag(
        None,
        "model before its vocabulary was extended: its tokens are what new pieces replace",
        type=model_name,
        required=True,
    )
    model: str = flag(None, "extended model, trained", type=model_name, required=True)
    start_model: Path | None = flag(
        None,
        "extended model as init_model.py or calibrate_output.py wrote it, from which the rows moved "
        "(default: means of the base's rows, as init_model.py makes them by default)",
        type=existing_directory,
    )
    data_input_dirs: list[Path] = flag(
        None,
        "comma list of directories with JSONL pre-training records, held out from training",
        type=directory_list,
        required=True,
    )
    dataset: list[Path] | None = flag(
        None,
        "prepared data that the model was trained on, for the number of occurrences; off when not given",
        nargs="+",
        type=existing_directory,
    )
    output_dir: Path = flag(None, "directory for ledger.json and ledger.md", type=Path, required=True)
    num_shown: int = flag(20, "pieces in each table of ledger.md", type=non_negative_int)
    context_bytes: int = flag(
        8192, "text that a model sees at once, in bytes; longer documents are cut", type=positive_int
    )
    stride_bytes: int = flag(
        4096, "bytes from one window of a long document to the next; the rest is context", type=positive_int
    )
    dtype: str = flag(
        "source", "arithmetic; source: as the weights are stored", choices=("source", "bf16", "fp16", "fp32")
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N; auto: the GPU if any", type=device_name)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="ledger.py", description=__doc__)
    add_settings(parser, LedgerSettings, check=_find_problems)
    return parser


def _find_problems(settings: LedgerSettings) -> list[str]:
    problems = []
    if settings.stride_bytes > settings.context_bytes:
        problems.append(
            f"--stride_bytes {settings.stride_bytes}: more than --context_bytes {settings.context_bytes}, so "
            "text would be left out"
        )
    if reason := why_not_output_directory(settings.output_dir):
        problems.append(f"--output_dir {settings.output_dir}: {reason}")
    elif reason := why_not_replaceable(
        settings.output_dir / JSON_FILE, lambda content: "saved_nats" in content["summary"]
    ):
        problems.append(f"--output_dir {settings.output_dir}: {JSON_FILE} {reason}")
    return problems


@dataclass(frozen=True)
class ScoredModel:
    """A model's losses on all documents, and the rows that were asked for."""

    documents: list[ScoredDocument]
    rows: EmbeddingRows


def main() -> None:
    settings = parse_settings(build_parser(), LedgerSettings)

    from colossal_llama.evaluation.held_out_text import read_documents
    from colossal_llama.evaluation.ledger_figures import make_markdown, summarise
    from colossal_llama.utils.files import locked_directory, write_json, write_text_atomically

    with locked_directory(settings.output_dir, "a ledger"):
        ledger = find_ledger(settings, read_documents(settings.data_input_dirs))
        summary = summarise(ledger)
        content = {
            "base_model": settings.base_model,
            "model": settings.model,
            "start_model": settings.start_model and str(settings.start_model),
            "summary": summary,
            "pieces": [entry.as_json() for entry in ledger],
        }
        write_json(settings.output_dir / JSON_FILE, content)
        text = make_markdown(ledger, settings.num_shown)
        write_text_atomically(settings.output_dir / MARKDOWN_FILE, text)
    log(
        f"{summary['pieces']:,} new pieces, {summary['compared']:,} compared, "
        f"{summary['worse_than_the_base']:,} of them worse than the base; {summary['hardly_moved']:,} "
        "hardly moved"
    )
    log(f"Ledger: {settings.output_dir / MARKDOWN_FILE}")


def find_ledger(settings: LedgerSettings, documents: Sequence[Document]) -> list[LedgerEntry]:
    """The entry of each new piece, in the order of ids.

    Raises:
        UserError: the model is no extension of the base, or something can't be loaded.
    """
    from colossal_llama.evaluation.ledger_figures import make_ledger, measure_movement, score_pieces
    from colossal_llama.evaluation.new_rows import mean_rows, read_rows

    pieces = _find_pieces(settings)
    new_ids = list(pieces.texts)
    counts = _count_in_data(settings, new_ids)
    base = score_documents(settings, settings.base_model, "--base_model", documents, None)
    model = score_documents(settings, settings.model, "--model", documents, new_ids)
    if settings.start_model is None:
        start = mean_rows(base.rows, list(pieces.replaced.values()))
    else:
        start = read_rows(settings.start_model, "--start_model", new_ids)
    scores = score_pieces(base.documents, model.documents, new_ids)
    output = None
    if model.rows.output is not None and start.output is not None:
        output = measure_movement(start.output, model.rows.output)
    moved = measure_movement(start.input, model.rows.input)
    return make_ledger(pieces.texts, counts, moved, output, scores)


def _find_pieces(settings: LedgerSettings) -> NewPieces:
    from colossal_llama.evaluation.new_rows import find_new_pieces

    base = _load_tokenizer(settings.base_model, "--base_model")
    pieces = find_new_pieces(base, _load_tokenizer(settings.model, "--model"))
    if pieces is None or not pieces.texts:
        why = "does not extend" if pieces is None else "has no more tokens than"
        raise UserError(
            f"--model {settings.model}: its tokenizer {why} that of --base_model {settings.base_model}; give "
            "the model that the vocabulary was extended from"
        )
    return pieces


def _load_tokenizer(name: str, flag: str) -> Any:
    from colossal_llama.inference.loading import find_base, load_tokenizer

    base, _ = find_base(name, flag)
    tokenizer = load_tokenizer(None, name, base, trust_remote_code=False, flag=flag)
    if not tokenizer.is_fast:
        raise UserError(f"{flag} {name}: its tokenizer is not a fast one; convert it with transformers first")
    return tokenizer


def _count_in_data(settings: LedgerSettings, new_ids: Sequence[int]) -> np.ndarray | None:
    """Occurrences of each new piece in `--dataset`; None where they are not known."""
    from colossal_llama.dataset.piece_counts import read_piece_counts
    from colossal_llama.training.data.prepared_rows import find_part_directories

    if settings.dataset is None:
        return None
    rows = range(new_ids[0], new_ids[-1] + 1)
    counts = read_piece_counts(find_part_directories(settings.dataset), rows)
    if counts is None:
        warn(
            "--dataset: has no counts of these new pieces: prepared by an earlier version, or with another "
            "tokenizer; prepare it again to see how often they occur"
        )
        return None
    return counts[[token_id - rows.start for token_id in new_ids]]


def score_documents(
    settings: LedgerSettings, name: str, flag: str, documents: Sequence[Document], rows: list[int] | None
) -> ScoredModel:
    """Loads a model, and the losses of all tokens that count under it.

    Args:
        rows: of its matrices, that are kept; None for all.
    """
    import numpy as np

    from colossal_llama.evaluation.scoring import Scorer, release, score_in_halves
    from colossal_llama.evaluation.windows import TextEncoder, cut_documents, make_batches
    from colossal_llama.inference.loading import find_context_length, load_model
    from colossal_llama.inference.settings import ModelSettings

    encoder = TextEncoder(_load_tokenizer(name, flag), name)
    encoded = encoder.encode(documents, Path(name).name)
    windows = cut_documents(
        encoded, encoder.bos_id, encoder.eos_id, settings.context_bytes, settings.stride_bytes
    )
    model = load_model(ModelSettings(name, device=settings.device, dtype=settings.dtype), flag).model
    longest, limit = max(len(window.ids) for window in windows), find_context_length(model.config)
    if longest > limit:
        raise UserError(
            f"{flag} {name}: a window has {longest:,} tokens, the model {limit:,} positions; use "
            f"--context_bytes {settings.context_bytes * limit // longest} or less"
        )
    scorer = Scorer(model)
    losses: list[list[np.ndarray]] = [[] for _ in documents]
    by_window: list[np.ndarray | None] = [None] * len(windows)
    total = sum(len(window.ids) for window in windows)
    with progress_bar(total=total, desc=Path(name).name, unit=" tokens", unit_scale=True) as bar:
        for batch in make_batches(windows, BATCH_TOKENS):
            chosen = [windows[number] for number in batch]
            for number, found in zip(batch, score_in_halves(scorer.token_losses, chosen), strict=True):
                by_window[number] = found
            bar.update(sum(len(window.ids) for window in chosen))
    for window, found in zip(windows, by_window, strict=True):
        assert found is not None
        losses[window.document].append(found)
    kept = _rows_of(model, rows)
    release(scorer)
    return ScoredModel(
        [_place(document, np.concatenate(found)) for document, found in zip(encoded, losses, strict=True)],
        kept,
    )


def _place(document: Any, losses: np.ndarray) -> ScoredDocument:
    """The tokens that count are the last ones of a document; the last loss is that of EOS."""
    import numpy as np

    from colossal_llama.evaluation.ledger_figures import ScoredDocument

    first = len(document.ids) - (len(losses) - 1)
    starts = np.concatenate([[0], document.ends[:-1]])
    return ScoredDocument(document.ids[first:], starts[first:], document.ends[first:], losses[:-1])


def _rows_of(model: Any, rows: list[int] | None) -> EmbeddingRows:
    from colossal_llama.evaluation.new_rows import EmbeddingRows

    def take(embedding: Any) -> torch.Tensor:
        weight = embedding.weight.detach()
        return (weight if rows is None else weight[rows]).cpu().clone()

    is_tied = model.config.tie_word_embeddings
    return EmbeddingRows(
        take(model.get_input_embeddings()), None if is_tied else take(model.get_output_embeddings())
    )


if __name__ == "__main__":
    run_command(main)
