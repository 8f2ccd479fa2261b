"""The second stage: what the workers write into each bin is decided here, on lengths alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama.dataset.bins import BinTask, deal_documents, write_bin
from colossal_llama.dataset.encode_stage import EncodedShards
from colossal_llama.dataset.output import OutputPaths, remove_unfinished_parts
from colossal_llama.dataset.settings import RowSettings
from colossal_llama.dataset.shards import ShardTask, read_table
from colossal_llama.dataset.statistics import BinCounts
from colossal_llama.dataset.tokenizer_copy import TokenizerInfo
from colossal_llama.dataset.workers import Workers
from colossal_llama.utils.console import progress_bar
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import with_filename_in_errors, write_json


@dataclass(frozen=True)
class BinRun:
    """What the bins of a run have in common.

    Attributes:
        key, id: the run that they belong to; see `claim_output`.
        kind: of the data set, for `prepared.json`.
        end_of_turn_ids: what ends an answer, where that is known.
        splice: pack several documents into a row.
        template: what `prepared.json` says of it, None where there is none.
    """

    key: str
    id: str
    kind: str
    tokenizer: TokenizerInfo
    end_of_turn_ids: tuple[int, ...]
    splice: bool
    template: dict[str, Any] | None = None


@dataclass(frozen=True)
class WrittenBins:
    """The bins in their order, and the lengths of all pieces in the order of the input."""

    bins: list[BinCounts]
    piece_lengths: np.ndarray


def write_bins(
    workers: Workers, encoded: EncodedShards, output: OutputPaths, rows: RowSettings, run: BinRun
) -> WrittenBins:
    """Deals the documents to bins and has them written; raises `UserError` when there are too few."""
    num_bins = rows.num_spliced_dataset_bins
    piece_lengths, num_pieces, strata = _collect_documents(encoded.tasks)
    if len(num_pieces) < num_bins:
        raise UserError(
            f"--num_spliced_dataset_bins {num_bins}: there are only {len(num_pieces)} documents; "
            + (f"ask for at most {len(num_pieces)} bins" if len(num_pieces) else "nothing is left to write")
        )
    documents, document_bounds = deal_documents(strata, num_bins, rows.seed)
    plan_dir = output.cache_dir.absolute() / "plan"
    bounds = _write_plan(plan_dir, piece_lengths, num_pieces, documents, document_bounds)
    shards_file = plan_dir / "shards.json"
    write_json(
        shards_file,
        [(str(t.tokens_path), s.num_tokens) for t, s in zip(encoded.tasks, encoded.summaries, strict=True)],
    )
    tasks = [
        BinTask(
            index=index,
            first_piece=bounds[index],
            end_piece=bounds[index + 1],
            plan_dir=str(plan_dir),
            shards_file=str(shards_file),
            record_dir=str(output.cache_dir.absolute() / "bins"),
            arrow_dir=str(output.arrow_dir.absolute()),
            jsonl_dir=str(output.jsonl_dir.absolute()),
            run_file=str(output.run_file.absolute()),
            run_key=run.key,
            run_id=run.id,
            seed=rows.seed,
            max_length=rows.max_length,
            splice=run.splice,
            kind=run.kind,
            tokenizer_fingerprint=run.tokenizer.fingerprint,
            vocab_size=run.tokenizer.vocab_size,
            end_of_turn_ids=run.end_of_turn_ids,
            template=run.template,
        )
        for index in range(num_bins)
    ]
    bins: list[BinCounts | None] = [None] * len(tasks)
    with progress_bar(
        total=int(piece_lengths.sum(dtype=np.int64)), desc="packing", unit="token", unit_scale=True
    ) as bar:
        for index, counts in workers.run(write_bin, tasks):
            bins[index] = counts
            bar.update(counts.tokens)
    remove_unfinished_parts(output)
    return WrittenBins(bins, piece_lengths)  # type: ignore[arg-type]


def _collect_documents(tasks: list[ShardTask]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the shards' tables: lengths of all pieces, pieces of all documents, their strata (int32 arrays).

    A stratum is an input directory with a category; strata are numbered by directory, then by name.
    """
    names: list[set[str]] = []
    tables = []
    for task in tasks:
        table = read_table(task)
        tables.append((task.shard.input_dir, table))
        names += [set() for _ in range(task.shard.input_dir + 1 - len(names))]
        names[task.shard.input_dir].update(table.category_names)
    ordered = [(input_dir, name) for input_dir, found in enumerate(names) for name in sorted(found)]
    stratum_of = {key: index for index, key in enumerate(ordered)}
    strata = [
        np.array([stratum_of[input_dir, name] for name in table.category_names], dtype=np.int32)[
            table.category_ids
        ]
        for input_dir, table in tables
    ]
    return (
        np.concatenate([table.piece_lengths for _, table in tables]),
        np.concatenate([table.num_pieces for _, table in tables]),
        np.concatenate(strata),
    )


def _write_plan(
    plan_dir: Path,
    piece_lengths: np.ndarray,
    num_pieces: np.ndarray,
    documents: np.ndarray,
    document_bounds: np.ndarray,
) -> list[int]:
    """Writes lengths and offsets of the pieces in the order of the deal; returns the bins' boundaries."""
    offsets = np.concatenate(([0], np.cumsum(piece_lengths, dtype=np.int64)[:-1]))
    first_pieces = np.concatenate(([0], np.cumsum(num_pieces, dtype=np.int64)[:-1]))
    sizes = num_pieces[documents].astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = np.repeat(first_pieces[documents], sizes) + within
    plan_dir.mkdir(parents=True, exist_ok=True)
    with with_filename_in_errors(plan_dir):
        np.save(plan_dir / "lengths.npy", piece_lengths[pieces])
        np.save(plan_dir / "offsets.npy", offsets[pieces])
    return starts[document_bounds].tolist()
