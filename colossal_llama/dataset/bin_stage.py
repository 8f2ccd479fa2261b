"""The second stage: what the workers write into each bin is decided here, on lengths alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

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
        new_rows: ids that the tokenizer's extension added.
    """

    key: str
    id: str
    kind: str
    tokenizer: TokenizerInfo
    end_of_turn_ids: tuple[int, ...]
    splice: bool
    new_rows: range = range(0)


@dataclass(frozen=True)
class Documents:
    """The documents of all shards, in the order of the input.

    Attributes:
        piece_lengths: tokens of each piece, int32 [pieces].
        num_pieces: of each document, int32 [documents].
        strata: input directory and category of each, as a number.
        input_dirs: the directory alone.
        held_out: whether it is kept out of training, bool.
    """

    piece_lengths: np.ndarray
    num_pieces: np.ndarray
    strata: np.ndarray
    input_dirs: np.ndarray
    held_out: np.ndarray

    def deal(self, num_bins: int, seed: int) -> Deal:
        """Training documents to bins; after them what each input directory holds out, in its order."""
        training = np.flatnonzero(~self.held_out)
        dealt, bounds = deal_documents(self.strata[training], num_bins, seed)
        held_out = np.flatnonzero(self.held_out)
        held_out = held_out[np.argsort(self.input_dirs[held_out], kind="stable")]
        input_dirs, sizes = np.unique(self.input_dirs[held_out], return_counts=True)
        return Deal(
            np.concatenate((training[dealt], held_out)),
            np.concatenate((bounds, bounds[-1] + np.cumsum(sizes))),
            input_dirs.tolist(),
        )


@dataclass(frozen=True)
class Deal:
    """Which document goes where: first the bins, then a part for each of `held_out_dirs`.

    Attributes:
        documents: in the order of the parts.
        bounds: where each part begins and the last ends.
        held_out_dirs: numbers of the input directories that hold documents out.
    """

    documents: np.ndarray
    bounds: np.ndarray
    held_out_dirs: list[int]


@dataclass(frozen=True)
class WrittenBins:
    """The bins in their order, held-out parts by input directory, and the lengths of all pieces in bins."""

    bins: list[BinCounts]
    held_out: dict[int, BinCounts]
    piece_lengths: np.ndarray


def write_bins(
    workers: Workers, encoded: EncodedShards, output: OutputPaths, rows: RowSettings, run: BinRun
) -> WrittenBins:
    """Deals the documents to bins and has them written; raises `UserError` when there are too few."""
    num_bins = rows.num_spliced_dataset_bins
    documents = _collect_documents(encoded.tasks)
    _check_numbers(documents, rows)
    deal = documents.deal(num_bins, rows.seed)
    plan_dir = output.cache_dir.absolute() / "plan"
    bounds = _write_plan(plan_dir, documents, deal)
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
            new_rows=(run.new_rows.start, run.new_rows.stop),
        )
        for index in range(num_bins)
    ]
    for number, input_dir in enumerate(deal.held_out_dirs, start=num_bins):
        records_file = plan_dir / f"held_out-{input_dir:05d}.json"
        write_json(
            records_file, [str(t.held_out_path) for t in encoded.tasks if t.shard.input_dir == input_dir]
        )
        tasks.append(
            replace(
                tasks[0],
                index=input_dir,
                first_piece=bounds[number],
                end_piece=bounds[number + 1],
                record_dir=str(output.cache_dir.absolute() / "held_out"),
                arrow_dir=str(output.held_out_arrow_dir.absolute()),
                jsonl_dir=str(output.held_out_dir.absolute()),
                records_file=str(records_file),
            )
        )
    bins: list[BinCounts | None] = [None] * len(tasks)
    with progress_bar(
        total=int(documents.piece_lengths.sum(dtype=np.int64)), desc="packing", unit="token", unit_scale=True
    ) as bar:
        for index, counts in workers.run(write_bin, tasks):
            bins[index] = counts
            bar.update(counts.tokens)
    remove_unfinished_parts(output)
    in_bins = np.repeat(~documents.held_out, documents.num_pieces)
    return WrittenBins(
        bins[:num_bins],  # type: ignore[arg-type]
        dict(zip(deal.held_out_dirs, bins[num_bins:], strict=True)),  # type: ignore[arg-type]
        documents.piece_lengths[in_bins],
    )


def _check_numbers(documents: Documents, rows: RowSettings) -> None:
    """Every bin needs a document, and a held-out share has to hold something out."""
    num_bins, num_held_out = rows.num_spliced_dataset_bins, int(documents.held_out.sum())
    num_documents = len(documents.num_pieces) - num_held_out
    if num_documents < num_bins:
        beside = f" beside {num_held_out} that are held out" if num_held_out else ""
        remedy = f"ask for at most {num_documents} bins" if num_documents else "nothing is left to write"
        raise UserError(
            f"--num_spliced_dataset_bins {num_bins}: there are only {num_documents} documents{beside}; "
            f"{remedy}"
        )
    if rows.held_out_share and not num_held_out:
        raise UserError(
            f"--held_out_share {rows.held_out_share}: none of the {num_documents} documents falls into the "
            "share; use a larger one"
        )


def _collect_documents(tasks: list[ShardTask]) -> Documents:
    """Reads the shards' tables.

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
    return Documents(
        np.concatenate([table.piece_lengths for _, table in tables]),
        np.concatenate([table.num_pieces for _, table in tables]),
        np.concatenate(strata),
        np.repeat([input_dir for input_dir, _ in tables], [len(table.num_pieces) for _, table in tables]),
        np.concatenate([table.held_out for _, table in tables]),
    )


def _write_plan(plan_dir: Path, documents: Documents, deal: Deal) -> list[int]:
    """Writes lengths and offsets of the pieces in the order of the deal; returns the parts' boundaries."""
    piece_lengths, num_pieces = documents.piece_lengths, documents.num_pieces
    offsets = np.concatenate(([0], np.cumsum(piece_lengths, dtype=np.int64)[:-1]))
    first_pieces = np.concatenate(([0], np.cumsum(num_pieces, dtype=np.int64)[:-1]))
    sizes = num_pieces[deal.documents].astype(np.int64)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    pieces = np.repeat(first_pieces[deal.documents], sizes) + within
    plan_dir.mkdir(parents=True, exist_ok=True)
    with with_filename_in_errors(plan_dir):
        np.save(plan_dir / "lengths.npy", piece_lengths[pieces])
        np.save(plan_dir / "offsets.npy", offsets[pieces])
    return starts[deal.bounds].tolist()
