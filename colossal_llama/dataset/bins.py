"""Second half of preparation: documents are dealt to bins, and a bin becomes an Arrow part and a JSONL file.

What the driver decides goes to the workers through files in `cache/plan/`, all in the order of the deal:

    lengths.npy    int32 [num_pieces], tokens of each piece
    offsets.npy    int64 [num_pieces], where it starts in the tokens of all shards laid end to end
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import pyarrow as pa

from colossal_llama.dataset.labels import count_loss_tokens, split_signed
from colossal_llama.dataset.packing import one_piece_per_row, pack_best_fit, shuffle_rows
from colossal_llama.dataset.piece_counts import PieceCounter
from colossal_llama.dataset.statistics import BinCounts
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import (
    aside_path,
    remove_path,
    replace_path,
    sync_directory,
    wait_for_file,
    with_filename_in_errors,
    write_json,
)

PREPARED_FORMAT = 1
END_IDS_KEY = "end_of_turn_ids"  # of `prepared.json`
ARROW_FILE = "data-00000-of-00001.arrow"
BATCH_TOKENS = 1 << 20
BATCH_ROWS = 1000
# A bin reads from all shards in turn (at most 16,384): opening one costs more than reading a document.
MAX_OPEN_FILES = 16384
SPARE_FILES = 256  # for everything else that a process has open
COLUMNS = ("input_ids", "labels", "document_lengths")


def part_name(index: int) -> str:
    return f"part-{index:05d}"


@dataclass(frozen=True)
class BinTask:
    """Pack and write one bin: pieces `first_piece` … `end_piece` of the plan. Paths are absolute.

    `run_file` says which run owns the output: `run_id` is this one's. `end_of_turn_ids`: what ends an answer,
    where that is known. `new_rows`: first and end of the ids that the tokenizer's extension added.
    `records_file`: of a part that is held out, names the files of its records; they become `jsonl_path`
    in place of its rows.
    """

    index: int
    first_piece: int
    end_piece: int
    plan_dir: str
    shards_file: str
    record_dir: str
    arrow_dir: str
    jsonl_dir: str
    run_file: str
    run_key: str
    run_id: str
    seed: int
    max_length: int
    splice: bool
    kind: str
    tokenizer_fingerprint: str
    vocab_size: int
    end_of_turn_ids: tuple[int, ...] = ()
    new_rows: tuple[int, int] = (0, 0)
    records_file: str = ""

    def __str__(self) -> str:
        name = "held-out part" if self.records_file else "bin"
        return f"{name} {self.index} ({self.end_piece - self.first_piece:,} pieces)"

    @property
    def arrow_path(self) -> Path:
        return Path(self.arrow_dir) / part_name(self.index)

    @property
    def jsonl_path(self) -> Path:
        return Path(self.jsonl_dir) / f"{part_name(self.index)}.jsonl"

    @property
    def record_path(self) -> Path:
        return Path(self.record_dir) / f"{part_name(self.index)}.json"


def deal_documents(strata: np.ndarray, num_bins: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Deals documents to bins like cards, stratum by stratum, each shuffled first.

    Every bin gets its share of every stratum to within one document, and no bin stays empty while there are
    as many documents as bins: the deal goes on where the stratum before ended.

    Args:
        strata: int array [num_documents], the stratum (input directory and category) of each.

    Returns:
        The documents in the order of bins, int64 [num_documents], and the bins' boundaries, [num_bins + 1].
    """
    # RandomState: numpy promises that its streams stay as they are.
    shuffled = np.random.RandomState([seed, 0]).permutation(len(strata))
    dealt = shuffled[np.argsort(strata[shuffled], kind="stable")]
    bin_of_dealt = np.arange(len(dealt)) % num_bins
    # Within a bin the strata are mixed again, so that the order inside a row says nothing of them.
    rank = np.empty(len(dealt), dtype=np.int64)
    rank[shuffled] = np.arange(len(dealt))
    order = np.lexsort((rank[dealt], bin_of_dealt))
    boundaries = np.concatenate(([0], np.cumsum(np.bincount(bin_of_dealt, minlength=num_bins))))
    return dealt[order], boundaries


def write_bin(task: BinTask) -> BinCounts:
    """Packs and writes a bin, unless this very run already has; returns its counts.

    Both outputs are written under temporary names, then renamed; the record of the bin comes last. It may run
    twice at once, when a worker that was given up for dead is not.
    """
    if (counts := _read_finished(task)) is not None:
        return counts
    arrow_aside, jsonl_aside = aside_path(task.arrow_path), aside_path(task.jsonl_path)
    arrow_aside.mkdir(parents=True)
    jsonl_aside.parent.mkdir(parents=True, exist_ok=True)
    try:
        counts = _write_rows(task, arrow_aside, jsonl_aside)
        if (finished := _read_finished(task)) is not None:
            return finished
        _check_owner(task)
        for aside, final in ((arrow_aside, task.arrow_path), (jsonl_aside, task.jsonl_path)):
            replace_path(aside, final)
            sync_directory(final.parent)
    finally:
        remove_path(arrow_aside)
        remove_path(jsonl_aside)
    write_json(task.record_path, {"run_key": task.run_key, **asdict(counts)})
    return counts


def _write_rows(task: BinTask, arrow_aside: Path, jsonl_aside: Path) -> BinCounts:
    lengths, offsets = (
        np.array(
            np.load(wait_for_file(Path(task.plan_dir) / name), mmap_mode="r")[
                task.first_piece : task.end_piece
            ]
        )
        for name in ("lengths.npy", "offsets.npy")
    )
    rows = pack_best_fit(lengths, task.max_length) if task.splice else one_piece_per_row(lengths)
    rows = shuffle_rows(rows, task.seed, task.index)
    counter = PieceCounter(range(*task.new_rows))
    with (
        TokenReader(Path(task.shards_file)) as reader,
        RowWriter(arrow_aside, None if task.records_file else jsonl_aside) as writer,
    ):
        for first, end in _batches_of_rows(rows.lengths):
            pieces = rows.pieces[rows.starts[first] : rows.starts[end]]
            stored = reader.read(offsets[pieces], lengths[pieces])
            if counter.new_rows:
                counter.add(split_signed(stored)[0])
            writer.write(
                stored, rows.lengths[first:end], lengths[pieces], np.diff(rows.starts[first : end + 1])
            )
    counts = BinCounts(
        len(rows), len(lengths), int(rows.lengths.sum()), writer.num_labels, int(rows.lengths[-1])
    )
    _write_description(arrow_aside, task, counts, writer.digest)
    if counter.new_rows:
        counter.write(arrow_aside)
    if task.records_file:
        _join_files(json.loads(wait_for_file(Path(task.records_file)).read_text("utf-8")), jsonl_aside)
    return counts


def _join_files(paths: list[str], joined: Path) -> None:
    with with_filename_in_errors(joined), open(joined, "wb") as file:
        for path in paths:
            with open(wait_for_file(Path(path)), "rb") as one:
                shutil.copyfileobj(one, file)
        file.flush()
        os.fsync(file.fileno())


class TokenReader:
    """Reads pieces by their offset in the tokens of all shards.

    Plain reads, no memory map: mapped pages would count as this process's memory.
    """

    def __init__(self, shards_file: Path) -> None:
        shards = json.loads(wait_for_file(shards_file).read_text(encoding="utf-8"))
        self.paths = [path for path, _ in shards]
        self.bases = np.concatenate(([0], np.cumsum([num_tokens for _, num_tokens in shards])))
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._max_open = _allow_open_files(min(MAX_OPEN_FILES, len(self.paths)))

    def __enter__(self) -> TokenReader:
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._open.values():
            file.close()

    def read(self, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The pieces' stored tokens, one after the other: int32 [sum of lengths]."""
        stored = np.empty(int(lengths.sum()), dtype="<i4")
        view = memoryview(stored).cast("B")
        shard_ids = np.searchsorted(self.bases, offsets, side="right") - 1
        positions = (4 * (offsets - self.bases[shard_ids])).tolist()
        start = 0
        for shard_id, position, size in zip(
            shard_ids.tolist(), positions, (4 * lengths.astype(np.int64)).tolist(), strict=True
        ):
            num_read = os.preadv(self._descriptor(shard_id), [view[start : start + size]], position)
            assert num_read == size, f"{self.paths[shard_id]} is shorter than its table says"
            start += size
        return stored

    def _descriptor(self, shard_id: int) -> int:
        file = self._open.get(shard_id)
        if file is None:
            if len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].close()
            path = wait_for_file(Path(self.paths[shard_id]))
            file = self._open[shard_id] = open(path, "rb", buffering=0)  # noqa: SIM115
        else:
            self._open.move_to_end(shard_id)
        return file.fileno()


def _allow_open_files(wanted: int) -> int:
    """How many files may be open beside `SPARE_FILES`; raises this process's soft limit as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


class RowWriter:
    """Writes rows in one pass to an Arrow stream, as `datasets.save_to_disk` lays it out, and to JSONL.

    Args:
        jsonl_path: None for no JSONL.
    """

    def __init__(self, arrow_dir: Path, jsonl_path: Path | None) -> None:
        self.num_labels = 0
        self._hash = hashlib.blake2b(digest_size=8)
        self._arrow_file = open(arrow_dir / ARROW_FILE, "wb")  # noqa: SIM115
        self._jsonl_file = jsonl_path and open(jsonl_path, "wb", buffering=1 << 20)  # noqa: SIM115
        self._stream = pa.ipc.new_stream(self._arrow_file, _schema())

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        with with_filename_in_errors(self._arrow_file.name):
            self._stream.close()
        for file in filter(None, (self._arrow_file, self._jsonl_file)):
            with with_filename_in_errors(file.name):
                file.flush()
                os.fsync(file.fileno())
                file.close()

    @property
    def digest(self) -> str:
        """16 hex digits over everything written so far."""
        return self._hash.hexdigest()

    def write(
        self,
        stored: np.ndarray,
        row_lengths: np.ndarray,
        document_lengths: np.ndarray,
        num_documents: np.ndarray,
    ) -> None:
        """Writes `len(row_lengths)` rows: `num_documents[r]` documents and `row_lengths[r]` tokens each."""
        input_ids, labels = split_signed(stored)
        document_lengths = document_lengths.astype(np.int32, copy=False)
        self.num_labels += count_loss_tokens(labels, document_lengths)
        token_starts = np.concatenate(([0], np.cumsum(row_lengths))).astype(np.int32)
        document_starts = np.concatenate(([0], np.cumsum(num_documents))).astype(np.int32)
        batch = pa.record_batch(
            [
                pa.ListArray.from_arrays(_as_arrow(token_starts), _as_arrow(input_ids)),
                pa.ListArray.from_arrays(_as_arrow(token_starts), _as_arrow(labels)),
                pa.ListArray.from_arrays(_as_arrow(document_starts), _as_arrow(document_lengths)),
            ],
            schema=_schema(),
        )
        with with_filename_in_errors(self._arrow_file.name):
            self._stream.write_batch(batch)
        for array in (stored, document_lengths, token_starts, document_starts):
            self._hash.update(array.data)
        if self._jsonl_file is None:
            return
        tokens, documents = token_starts.tolist(), document_starts.tolist()
        with with_filename_in_errors(self._jsonl_file.name):
            for row in range(len(row_lengths)):
                ids = slice(tokens[row], tokens[row + 1])
                value = {
                    "input_ids": input_ids[ids],
                    "labels": labels[ids],
                    "document_lengths": document_lengths[documents[row] : documents[row + 1]],
                }
                self._jsonl_file.write(
                    orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
                )


def _as_arrow(array: np.ndarray) -> pa.Array:
    """An int32 array without copying it; `pa.array` would import pandas first, in every worker."""
    return pa.Array.from_buffers(pa.int32(), len(array), [None, pa.py_buffer(array)])


def _features() -> dict[str, Any]:
    # "Sequence" is what datasets 3 writes; later versions read it too.
    return {name: {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "Sequence"} for name in COLUMNS}


def _schema() -> pa.Schema:
    metadata = {"huggingface": json.dumps({"info": {"features": _features()}})}
    return pa.schema([(name, pa.list_(pa.int32())) for name in COLUMNS], metadata=metadata)


def _write_description(directory: Path, task: BinTask, counts: BinCounts, digest: str) -> None:
    """The files beside the Arrow stream: two for `datasets.load_from_disk`, and our own `prepared.json`."""
    write_json(
        directory / "dataset_info.json",
        {"citation": "", "description": "", "features": _features(), "homepage": "", "license": ""},
    )
    write_json(
        directory / "state.json",
        {
            "_data_files": [{"filename": ARROW_FILE}],
            "_fingerprint": digest,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        },
    )
    write_json(
        directory / "prepared.json",
        {
            "format": PREPARED_FORMAT,
            "kind": task.kind,
            "tokenizer_fingerprint": task.tokenizer_fingerprint,
            "vocab_size": task.vocab_size,
            "max_length": task.max_length,
            "num_rows": counts.rows,
            "num_tokens": counts.tokens,
            **({END_IDS_KEY: list(task.end_of_turn_ids)} if task.end_of_turn_ids else {}),
        },
    )


def _read_finished(task: BinTask) -> BinCounts | None:
    if not (task.record_path.exists() and task.arrow_path.exists() and task.jsonl_path.exists()):
        return None
    record = json.loads(task.record_path.read_text(encoding="utf-8"))
    return BinCounts(**record) if record.pop("run_key") == task.run_key else None


def _check_owner(task: BinTask) -> None:
    """A worker that outlived its run, cut off from the network perhaps, must not write over a later one's."""
    try:
        owner = json.loads(Path(task.run_file).read_text(encoding="utf-8")).get("run_id")
    except FileNotFoundError:
        owner = None
    if owner != task.run_id:
        raise UserError(f"{task.arrow_path.parent}: another run has taken over; nothing was written")


def _batches_of_rows(row_lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Boundaries of runs of rows of at most `BATCH_TOKENS` tokens (or one row) and `BATCH_ROWS` rows."""
    first, num_tokens = 0, 0
    for row, length in enumerate(row_lengths.tolist()):
        if row > first and (num_tokens + length > BATCH_TOKENS or row - first >= BATCH_ROWS):
            yield first, row
            first, num_tokens = row, 0
        num_tokens += length
    if first < len(row_lengths):
        yield first, len(row_lengths)
