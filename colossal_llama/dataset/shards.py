"""First half of preparation: one shard of the input becomes a file of tokens and a table of its documents.

In `cache/shards/`, named by a digest of all that decides the content:

    <key>.tokens   int32, little-endian: the pieces of all kept documents (see `labels`), end to end
    <key>.jsonl    the records that are held out, with `--held_out_share`
    <key>.npz      lengths of the pieces, pieces and category of each document, counts; written last, so a
                   shard with this file is finished, and a repeated run takes it as it is
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from colossal_llama.corpus.jsonl import Shard, read_records
from colossal_llama.corpus.records import BadRecord, parse_object
from colossal_llama.dataset.encoders import load_encoder
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome, RecordEncoder
from colossal_llama.dataset.engines.checked import EngineDifference
from colossal_llama.dataset.held_out import is_held_out
from colossal_llama.dataset.statistics import Counts
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import aside_path, wait_for_file, with_filename_in_errors, write_json
from colossal_llama.utils.messages import MAX_LISTED_PROBLEMS

CACHE_FORMAT = 2  # raised when the same records become other documents
CACHE_NAME = re.compile(
    r"[0-9a-f]{24}(\.\d+\.tmp|\.tokens|\.jsonl|\.npz)"
    r"|\.[0-9a-f]{24}\.(tokens|jsonl|npz)\.[0-9a-f]{16}\.tmp"
)
# There when an engine made other ids than the tokenizer: only a sample of its shards was checked.
DISTRUST_FILE = "other-ids.json"
# A batch's encodings (some 300 bytes a token) are all in memory at once.
BATCH_CHARACTERS = 1 << 19
BATCH_RECORDS = 1024


@dataclass(frozen=True)
class ShardTask:
    """Encode one shard into `cache_dir` (an absolute path), or (`check_only`) only read its records."""

    shard: Shard
    spec: EncoderSpec
    cache_dir: str
    check_only: bool = False
    held_out_share: float = 0.0

    def __str__(self) -> str:
        return f"{self.shard.path}, bytes {self.shard.start:,} to {self.shard.end:,}"

    @property
    def key(self) -> str:
        what = [CACHE_FORMAT, dataclasses.asdict(self.shard), self.spec.as_key()]
        if self.held_out_share:
            what.append(self.held_out_share)
        text = json.dumps(what, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def tokens_path(self) -> Path:
        return Path(self.cache_dir) / f"{self.key}.tokens"

    @property
    def held_out_path(self) -> Path:
        return Path(self.cache_dir) / f"{self.key}.jsonl"

    @property
    def table_path(self) -> Path:
        return Path(self.cache_dir) / f"{self.key}.npz"


@dataclass
class ShardSummary:
    """What the driver learns of a shard at once; the arrays stay in its table.

    `categories` counts the documents for training and those that are dropped, `held_out` the others.
    """

    num_bytes: int
    num_lines: int = 0
    num_tokens: int = 0
    bad_records: Counter[str] = field(default_factory=Counter)
    listed_bad_records: list[tuple[int, str]] = field(default_factory=list)  # line within the shard, from 1
    categories: dict[str, Counts] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)  # of records -> line of the first, within the shard
    held_out: dict[str, Counts] = field(default_factory=dict)
    held_out_bytes: int = 0  # of their records as JSONL


@dataclass
class ShardTable:
    """The documents that a shard keeps: document i has `num_pieces[i]` pieces, one after the other."""

    piece_lengths: np.ndarray
    num_pieces: np.ndarray
    category_ids: np.ndarray
    category_names: list[str]
    held_out: np.ndarray


def encode_shard(task: ShardTask) -> ShardSummary:
    """Encodes a shard, unless it is in the cache; returns its summary.

    It may run twice at once, when a worker that was given up for dead is not: both write the same bytes under
    names of their own, and rename.
    """
    if (finished := _read_finished(task)) is not None:
        return finished
    encoder = load_encoder(task.spec)
    summary = ShardSummary(num_bytes=task.shard.end - task.shard.start)
    if task.check_only:
        for _ in _read_batches(task.shard, encoder, summary):
            pass
        return summary
    piece_lengths: list[int] = []
    num_pieces: list[int] = []
    category_ids: list[int] = []
    category_index: dict[str, int] = {}
    held_out: list[bool] = []
    with contextlib.ExitStack() as files:
        held_out_file = files.enter_context(_new_file(task.held_out_path)) if task.held_out_share else None
        with _new_file(task.tokens_path) as file:
            for lines, records in _read_batches(task.shard, encoder, summary):
                pieces = []
                outcomes = _encode(task, encoder, lines, records)
                for record, outcome in zip(records, outcomes, strict=True):
                    # What is dropped is dropped, on whichever side its text falls.
                    is_kept_out = (
                        held_out_file is not None
                        and bool(outcome.pieces)
                        and is_held_out(record.text, task.held_out_share)
                    )
                    of_side = summary.held_out if is_kept_out else summary.categories
                    counts = of_side.setdefault(record.category, Counts())
                    counts.add_outcome(outcome, record.num_characters)
                    if is_kept_out:
                        line = orjson.dumps(record.as_json(), option=orjson.OPT_APPEND_NEWLINE)
                        summary.held_out_bytes += held_out_file.write(line)
                    if outcome.pieces:
                        held_out.append(is_kept_out)
                        pieces.extend(outcome.pieces)
                        piece_lengths.extend(map(len, outcome.pieces))
                        num_pieces.append(len(outcome.pieces))
                        index = category_index.setdefault(record.category, len(category_index))
                        category_ids.append(index)
                if pieces:
                    file.write(np.concatenate(pieces).astype("<i4", copy=False).data)
        summary.num_tokens = sum(piece_lengths)
    table = ShardTable(
        np.array(piece_lengths, dtype=np.int32),
        np.array(num_pieces, dtype=np.int32),
        np.array(category_ids, dtype=np.int32),
        list(category_index),
        np.array(held_out, dtype=bool),
    )
    _write_table(task, table, summary)
    return summary


def read_summary(task: ShardTask) -> ShardSummary:
    with np.load(task.table_path) as arrays:
        value = json.loads(arrays["summary"].tobytes())
    value["bad_records"] = Counter(value["bad_records"])
    value["listed_bad_records"] = [(line, what) for line, what in value["listed_bad_records"]]
    value.setdefault("formats", {"messages": 1})  # earlier versions knew no other
    for side in ("categories", "held_out"):
        value[side] = {name: Counts.from_json(c) for name, c in value.get(side, {}).items()}
    return ShardSummary(**value)


def read_table(task: ShardTask) -> ShardTable:
    with np.load(wait_for_file(task.table_path)) as arrays:
        return ShardTable(
            arrays["piece_lengths"],
            arrays["num_pieces"],
            arrays["category_ids"],
            json.loads(arrays["category_names"].tobytes()),
            # A shard that an earlier version encoded has none.
            arrays["held_out"] if "held_out" in arrays else np.zeros(len(arrays["num_pieces"]), dtype=bool),
        )


def remove_stale_shards(cache_dir: Path, tasks: list[ShardTask]) -> None:
    """Removes what earlier runs with other input or settings, or killed ones, left in the cache."""
    wanted = {path.name for task in tasks for path in (task.table_path, task.tokens_path, task.held_out_path)}
    for path in cache_dir.iterdir():
        if CACHE_NAME.fullmatch(path.name) and path.name not in wanted:
            path.unlink()


def _read_finished(task: ShardTask) -> ShardSummary | None:
    if not (task.table_path.exists() and task.tokens_path.exists()):
        return None
    summary = read_summary(task)
    is_whole = task.tokens_path.stat().st_size == 4 * summary.num_tokens
    if task.held_out_share:
        path = task.held_out_path
        is_whole = is_whole and path.exists() and path.stat().st_size == summary.held_out_bytes
    return summary if is_whole else None


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block ends, unless it ends with an error."""
    aside = aside_path(path)
    try:
        with with_filename_in_errors(path), open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _encode(
    task: ShardTask, encoder: RecordEncoder, lines: Sequence[int], records: Sequence[Any]
) -> list[Outcome]:
    """What becomes of each record; a difference between engines stops the run at its line."""
    try:
        return encoder.encode(records)
    except EngineDifference as difference:
        write_json(Path(task.cache_dir) / DISTRUST_FILE, {"difference": str(difference)})
        raise UserError(_describe_difference(task, encoder, lines, records, difference)) from None


def _describe_difference(
    task: ShardTask,
    encoder: RecordEncoder,
    lines: Sequence[int],
    records: Sequence[Any],
    difference: EngineDifference,
) -> str:
    shard = task.shard
    before = 0
    if shard.start:
        before = sum(1 for _ in read_records(dataclasses.replace(shard, start=0, end=shard.start), ("",)))
    where = f"{before + lines[0]} to {before + lines[-1]}"
    for line, record in zip(lines, records, strict=True):
        try:
            encoder.encode([record])
        except EngineDifference as again:
            where, difference = str(before + line), again
            break
    return (
        f"{shard.path}:{where}: {difference}; nothing was written. Use --tokenizer_engine hf, "
        f"and report this to the makers of {difference.engine}"
    )


def distrust_shards(cache_dir: Path) -> None:
    """Removes all shards where an engine of an earlier run was found to make other ids."""
    if not (cache_dir / DISTRUST_FILE).exists():
        return
    remove_stale_shards(cache_dir, [])
    (cache_dir / DISTRUST_FILE).unlink()


def _read_batches(
    shard: Shard, encoder: RecordEncoder, summary: ShardSummary
) -> Iterator[tuple[list[int], list[Any]]]:
    """Records with the numbers of their lines in the shard."""
    batch: list[Any] = []
    lines: list[int] = []
    num_characters = 0
    for line in read_records(shard, encoder.fields):
        summary.num_lines += 1
        is_row = isinstance(line, dict)
        if not is_row and not line.strip():  # also what is left of a file that holds only a byte order mark
            continue
        try:
            record = encoder.parse(line if is_row else parse_object(line))
        except BadRecord as bad:
            summary.bad_records[bad.kind] += 1
            if len(summary.listed_bad_records) < MAX_LISTED_PROBLEMS:
                summary.listed_bad_records.append((summary.num_lines, str(bad)))
            continue
        if record.format not in summary.formats:
            summary.formats[record.format] = summary.num_lines
        batch.append(record)
        lines.append(summary.num_lines)
        num_characters += record.num_characters
        if num_characters >= BATCH_CHARACTERS or len(batch) >= BATCH_RECORDS:
            yield lines, batch
            lines, batch, num_characters = [], [], 0
    if batch:
        yield lines, batch


def _write_table(task: ShardTask, table: ShardTable, summary: ShardSummary) -> None:
    def as_bytes(value: Any) -> np.ndarray:
        return np.frombuffer(json.dumps(value, default=vars).encode(), dtype=np.uint8)

    with _new_file(task.table_path) as file:
        np.savez(
            file,
            piece_lengths=table.piece_lengths,
            num_pieces=table.num_pieces,
            category_ids=table.category_ids,
            category_names=as_bytes(table.category_names),
            held_out=table.held_out,
            summary=as_bytes(summary),
        )
