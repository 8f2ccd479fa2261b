"""From prepared bins to the tensors of a training step: memory-mapped rows, their order, and the collator."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from colossal_llama.dataset.labels import without_first_tokens
from colossal_llama.training.loss import IGNORE_INDEX
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object

PREPARED_FILE = "prepared.json"
_COLUMNS = ("input_ids", "labels", "document_lengths")
# The kernel maps at most 65,530 files into a process unless told otherwise, and an open part takes memory.
MAX_OPEN_PARTS = 4096
# 4 MB of row numbers, or 8: what a core's cache holds.
_ROWS_AT_ONCE = 1 << 20
_DIGEST = b"digest"
_PART_NAME = re.compile(r"part-(\d+)$")


@dataclass
class Row:
    """One row of a bin: `input_ids` and `labels` [tokens], `document_lengths` [documents], summing to
    the tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    document_lengths: np.ndarray


class RowSource(Protocol):
    """What training reads rows from: a prepared data set, or random rows for a benchmark."""

    bucket_ranges: list[list[tuple[int, int]]]
    num_tokens: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def describe_row(self, index: int) -> str: ...


def find_part_directories(paths: Sequence[Path], flag: str = "--dataset") -> list[Path]:
    """Expands each path to part directories: itself when it is one, else every `part-*` below it.

    Args:
        flag: the argument that named the paths, for messages.

    Raises:
        UserError: a path is missing or holds no prepared data, or a part is given twice.
    """
    parts, problems = [], []
    for path in paths:
        if not path.is_dir():
            problems.append(f"{flag} {path}: no such directory")
        elif (path / "state.json").is_file():
            parts.append(path)
        else:
            found = sorted(
                p for p in path.iterdir() if _PART_NAME.match(p.name) and (p / "state.json").is_file()
            )
            if not found:
                problems.append(
                    f"{flag} {path}: neither a part directory nor a folder of part-* directories; "
                    "give the arrow/ directory, or parts of it, that a prepare script wrote"
                )
            parts.extend(found)
    seen: set[Path] = set()
    for part in parts:
        if (resolved := part.resolve()) in seen:
            problems.append(f"{flag} {part}: given twice; its rows would count twice")
        seen.add(resolved)
    if problems:
        raise UserError(problems)
    return parts


class PreparedDataset:
    """Rows of all given parts behind one another, memory-mapped.

    Args:
        parts: part directories, as `find_part_directories` returns them.
        max_length: rows longer than this are refused.
        need_documents: refuse parts without `document_lengths` (bins made by the original suite).
        tokenizer_fingerprint: of the model's tokenizer; parts made with another one are refused.
        flag: the argument that named the parts, for messages.

    Attributes:
        bucket_ranges: for each bucket, in order, the [start, end) ranges of its rows; part-N of all
            directories together is bucket N.
        num_tokens: in all rows.
        fingerprint: changes when the rows, their number or their order change; of bins that other programs
            made it knows a few rows only.
    """

    def __init__(
        self,
        parts: Sequence[Path],
        max_length: int,
        need_documents: bool,
        tokenizer_fingerprint: str | None = None,
        flag: str = "--dataset",
    ) -> None:
        self.paths = list(parts)
        self.max_length = max_length
        self._open_tables: dict[int, pa.Table] = {}
        self.starts = np.zeros(len(self.paths) + 1, dtype=np.int64)
        self.num_tokens = 0
        digest, problems, buckets = hashlib.sha256(), [], {}
        for number, path in enumerate(self.paths):
            self.starts[number + 1] = self.starts[number]
            try:
                table = self._table(number)
            except UserError as error:
                problems += [f"{flag} {problem}; prepare the data again" for problem in error.problems]
                continue
            except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
                problems.append(f"{flag} {path}: cannot be read ({type(error).__name__}: {error})")
                continue
            missing = {"input_ids", "labels"} - set(table.column_names)
            if missing:
                problems.append(f"{flag} {path}: has no column {', '.join(sorted(missing))}")
                continue
            self.starts[number + 1] += len(table)
            problems.extend(_check_part(path, table, need_documents, tokenizer_fingerprint, flag))
            columns = [name for name in _COLUMNS if name in table.column_names]
            nulls = [name for name in columns if table.column(name).null_count]
            if nulls:
                problems.append(f"{flag} {path}: has rows without {' and '.join(nulls)}")
                continue
            lengths = _row_lengths(table, "input_ids")
            unequal = np.flatnonzero(lengths != _row_lengths(table, "labels"))
            if len(unequal):
                problems.append(f"{flag} {path}: row {unequal[0]} has not as many labels as input_ids")
                continue
            if len(lengths) and lengths.max() > max_length:
                problems.append(
                    f"{path}: row {int(lengths.argmax())} has {int(lengths.max())} tokens, "
                    f"more than --max_length {max_length}; prepare the data with that length or raise it"
                )
            self.num_tokens += int(lengths.sum())
            digest.update(f"{len(table)} {int(lengths.sum())} ".encode())
            for row in {0, len(table) // 2, len(table) - 1} if len(table) else ():
                for column in ("input_ids", "labels"):
                    digest.update(_values(table, column, row).astype(np.int64).tobytes())
            if (path / PREPARED_FILE).is_file():
                digest.update(table.schema.metadata[_DIGEST])
            match = _PART_NAME.search(path.name)
            bucket = int(match.group(1)) if match else number
            buckets.setdefault(bucket, []).append((int(self.starts[number]), int(self.starts[number + 1])))
        if not problems and len(self) == 0:
            problems.append(f"{flag}: the given parts hold no rows at all")
        if problems:
            raise UserError(problems)
        self.bucket_ranges = [buckets[bucket] for bucket in sorted(buckets)]
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _table(self, part: int) -> pa.Table:
        """A part's rows, memory-mapped; the part that was opened first is closed when too many are open."""
        table = self._open_tables.get(part)
        if table is None:
            if len(self._open_tables) >= MAX_OPEN_PARTS:
                del self._open_tables[next(iter(self._open_tables))]
            table = self._open_tables[part] = _open_part(self.paths[part])
        return table

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def __getitem__(self, index: int) -> Row:
        part, row = self._locate(index)
        table = self._table(part)
        input_ids = _values(table, "input_ids", row)
        if "document_lengths" in table.column_names:
            document_lengths = _values(table, "document_lengths", row)
        else:
            document_lengths = np.array([len(input_ids)])
        return Row(input_ids, _values(table, "labels", row), document_lengths)

    def find_bad_row(self, vocab_size: int, need_documents: bool) -> str | None:
        """The first row that the collator would refuse, of bins that other programs made."""
        for number, path in enumerate(self.paths):
            if (path / PREPARED_FILE).is_file():
                continue  # made with this tokenizer, whose tokens the model has
            table = self._table(number)
            lengths = _row_lengths(table, "input_ids")
            suspects = [_row_extremes(table, "input_ids", np.minimum) < 0]
            suspects.append(_row_extremes(table, "input_ids", np.maximum) >= vocab_size)
            if need_documents:
                suspects.append(_row_extremes(table, "document_lengths", np.add) != lengths)
            for row in np.flatnonzero(np.any(suspects, axis=0)):
                index = int(self.starts[number]) + int(row)
                if problem := find_row_problem(self, index, self[index], vocab_size, need_documents):
                    return problem
        return None

    def describe_row(self, index: int) -> str:
        part, row = self._locate(index)
        return f"{self.paths[part]} row {row}"


def _open_part(path: Path) -> pa.Table:
    """Maps what `datasets.save_to_disk` laid out; that library takes several times as long."""
    state = read_json_object(path / "state.json")
    tables = []
    for file in state["_data_files"]:
        with pa.memory_map(str(path / file["filename"])) as mapped:
            tables.append(pa.ipc.open_stream(mapped).read_all())
    if not tables:  # what `datasets` makes of no rows
        tokens = pa.array([], pa.list_(pa.int32()))
        tables = [pa.table({"input_ids": tokens, "labels": tokens, "document_lengths": tokens})]
    # The prepare scripts leave a checksum of all rows there; other programs, a name.
    return pa.concat_tables(tables).replace_schema_metadata({_DIGEST: str(state.get("_fingerprint"))})


def _values(table: pa.Table, column: str, row: int) -> np.ndarray:
    # By DLPack, without a copy: pyarrow's `to_numpy` imports pandas first.
    return np.from_dlpack(table.column(column)[row].values)


def _row_lengths(table: pa.Table, column: str) -> np.ndarray:
    chunks = [np.from_dlpack(chunk.value_lengths()) for chunk in table.column(column).chunks]
    return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int32)


def _row_extremes(table: pa.Table, column: str, combine: np.ufunc) -> np.ndarray:
    """The smallest or largest value of each row, or its sum, [rows]; 0 for an empty row."""
    results = [np.zeros(0, dtype=np.int64)]
    for chunk in table.column(column).chunks:
        lengths = np.from_dlpack(chunk.value_lengths())
        combined = np.zeros(len(lengths), dtype=np.int64)
        filled = np.flatnonzero(lengths)
        if len(filled):
            starts = (np.cumsum(lengths) - lengths)[filled]
            combined[filled] = combine.reduceat(np.from_dlpack(chunk.flatten()), starts, dtype=np.int64)
        results.append(combined)
    return np.concatenate(results)


def find_row_problem(
    source: RowSource, index: int, row: Row, vocab_size: int, need_documents: bool
) -> str | None:
    """What keeps a row from being trained on, or None."""
    outside = row.input_ids[(row.input_ids < 0) | (row.input_ids >= vocab_size)]
    if len(outside):
        return (
            f"{source.describe_row(index)}: holds token {int(outside[0])}, but the model has {vocab_size} "
            "embeddings; it was prepared with another tokenizer"
        )
    num_tokens, total = len(row.input_ids), int(row.document_lengths.sum())
    if need_documents and num_tokens and total != num_tokens:
        return (
            f"{source.describe_row(index)}: document_lengths sum to {total}, the row has {num_tokens} "
            "tokens; prepare the data again"
        )
    return None


def _check_part(
    path: Path, table: pa.Table, need_documents: bool, tokenizer_fingerprint: str | None, flag: str
) -> list[str]:
    if need_documents and "document_lengths" not in table.column_names:
        return [
            f"{flag} {path}: has no document_lengths (made by the original suite?), so its documents "
            "cannot be kept apart; pass --no-isolate_documents, or prepare the data again"
        ]
    if not (path / PREPARED_FILE).is_file() or tokenizer_fingerprint is None:
        return []
    try:
        prepared = read_json_object(path / PREPARED_FILE)
    except UserError as error:
        return [f"{flag} {problem}; prepare the data again" for problem in error.problems]
    if prepared.get("tokenizer_fingerprint") != tokenizer_fingerprint:
        return [
            f"{flag} {path}: was prepared with another tokenizer (fingerprint "
            f"{prepared.get('tokenizer_fingerprint')}, {prepared.get('vocab_size')} tokens) than the model's "
            f"({tokenizer_fingerprint}); prepare it with --tokenizer_dir set to the model's directory"
        ]
    return []


class RowOrder:
    """The order of all rows in each epoch, fixed by (seed, epoch, buckets) and by nothing else.

    Without `bucketed` the whole data set is shuffled; with it, buckets come in order and each is shuffled
    inside.
    """

    def __init__(self, source: RowSource, seed: int, bucketed: bool) -> None:
        self.num_rows = len(source)
        self.seed = seed
        self.buckets = source.bucket_ranges if bucketed else [[(0, self.num_rows)]]

    def permutation(self, epoch: int) -> np.ndarray:
        """Row numbers of one epoch in training order, [rows]."""
        rows = np.empty(self.num_rows, dtype=np.uint32 if self.num_rows < 2**32 else np.int64)
        filled = 0
        for number, ranges in enumerate(self.buckets):
            size = sum(end - start for start, end in ranges)
            _shuffle(ranges, rows[filled : filled + size], [self.seed, epoch, number])
            filled += size
        return rows


def _shuffle(ranges: Sequence[tuple[int, int]], out: np.ndarray, seed: Sequence[int]) -> None:
    """Fills `out` with the numbers of all ranges, every order being as likely as any other.

    Swaps all over the memory grow slower with it, so numbers that fill more than a cache are dealt to piles
    at random, and each pile is shuffled by itself (Rao 1961, Sandelius 1962).
    """
    num_piles = max(1, min(256, -(-len(out) // _ROWS_AT_ONCE)))
    sizes = np.zeros(num_piles, dtype=np.int64)
    for _, piles in _deal(ranges, num_piles, np.random.default_rng(seed)):
        sizes += np.bincount(piles, minlength=num_piles)
    filled = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)  # deals the same again: nothing had to be kept
    for numbers, piles in _deal(ranges, num_piles, generator):
        by_pile = numbers[np.argsort(piles, kind="stable")]
        ends = np.cumsum(np.bincount(piles, minlength=num_piles))
        for pile, share in enumerate(np.split(by_pile, ends[:-1])):
            out[filled[pile] : filled[pile] + len(share)] = share
            filled[pile] += len(share)
    for size, end in zip(sizes, filled, strict=True):
        generator.shuffle(out[end - size : end])


def _deal(
    ranges: Sequence[tuple[int, int]], num_piles: int, generator: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers of all ranges and the pile of each, in pieces: they are never in memory twice."""
    for start, end in ranges:
        for first in range(start, end, _ROWS_AT_ONCE):
            numbers = np.arange(first, min(first + _ROWS_AT_ONCE, end))
            yield numbers, generator.integers(num_piles, size=len(numbers), dtype=np.uint8)


@dataclass
class BatchPlan:
    """How the rows of an optimizer step are dealt out.

    A step takes `rows_per_step` consecutive rows of the order; pass `a` of data-parallel rank `r` gets rows
    `(a * dp_size + r) * batch_size` and following of them. Every rank of a tensor, pipeline or sequence
    group has the same `dp_rank` and so the same rows.
    """

    batch_size: int
    accumulation_steps: int
    dp_size: int
    dp_rank: int

    @property
    def rows_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps * self.dp_size


class StepSampler:
    """Yields the row numbers of every micro-batch of this rank, from a position to the end of the last epoch.

    Args:
        position: rows of the first epoch that earlier training has already used.
    """

    def __init__(self, order: RowOrder, plan: BatchPlan, epoch: int, position: int, num_epochs: int) -> None:
        self.order, self.plan = order, plan
        self.epoch, self.position, self.num_epochs = epoch, position, num_epochs

    def __iter__(self) -> Iterator[list[int]]:
        plan = self.plan
        position = self.position
        for epoch in range(self.epoch, self.num_epochs):
            permutation = self.order.permutation(epoch)
            while position + plan.rows_per_step <= len(permutation):
                step = permutation[position : position + plan.rows_per_step]
                for accumulation in range(plan.accumulation_steps):
                    start = (accumulation * plan.dp_size + plan.dp_rank) * plan.batch_size
                    yield [int(row) for row in step[start : start + plan.batch_size]]
                position += plan.rows_per_step
            position = 0


class EvaluationSampler:
    """Every row exactly once over all ranks; short batches are filled with None (a row without labels)."""

    def __init__(self, num_rows: int, plan: BatchPlan) -> None:
        self.num_rows, self.plan = num_rows, plan

    def __len__(self) -> int:
        return -(-self.num_rows // (self.plan.batch_size * self.plan.dp_size))

    def __iter__(self) -> Iterator[list[int | None]]:
        plan = self.plan
        for batch in range(len(self)):
            start = (batch * plan.dp_size + plan.dp_rank) * plan.batch_size
            rows = range(start, start + plan.batch_size)
            yield [row if row < self.num_rows else None for row in rows]


class Collator:
    """Makes a batch of rows.

    Two rows, `max_length` 6; the first holds two documents of three and two tokens, the second one of
    three. Labels are shifted here: `labels[t]` is what position t has to predict, and nothing predicts a
    document's first token.

        input_ids        a b c d e .      f g h . . .
        labels           b c - e - -      g h - - - -        (- is -100; all other tokens have loss)
        position_ids     0 1 2 0 1 0      0 1 2 0 1 2
        document_index   0 0 0 1 1 -      0 0 0 - - -        (- is -1: padding is a document of its own)

    Args:
        pad_token_id: id that fills rows; it is never attended to by real tokens and never has loss.
        pad_to: every row gets this length; None pads to the longest row of the batch.
        multiple_of: the padded length is a multiple of this (sequence parallelism splits it evenly).
        isolate_documents: off, the documents of a row see each other and positions run on.
        vocab_size: of the model's embeddings; a token outside is an error.
    """

    def __init__(
        self,
        source: RowSource,
        pad_token_id: int,
        pad_to: int | None,
        isolate_documents: bool,
        vocab_size: int,
        multiple_of: int = 1,
    ) -> None:
        self.source = source
        self.pad_token_id, self.pad_to, self.multiple_of = pad_token_id, pad_to, multiple_of
        self.isolate_documents, self.vocab_size = isolate_documents, vocab_size

    def __call__(self, rows: list[int | None]) -> dict[str, Any]:
        """Makes the batch; a `UserError` comes back as `problem`: a loader worker can't raise it as it is.

        Returns:
            `input_ids`, `labels`, `position_ids`, `document_index` [rows, length] and `row_index` [rows],
            all int64 (-1 for an empty row), `num_tokens` (padding not counted), `problem`.
        """
        try:
            return self._collate(rows)
        except UserError as error:
            return {"problem": str(error)}

    def _collate(self, rows: list[int | None]) -> dict[str, Any]:
        contents = [None if row is None else self.source[row] for row in rows]
        length = self.pad_to or max([1, *(len(c.input_ids) for c in contents if c is not None)])
        length = -(-length // self.multiple_of) * self.multiple_of
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        position_ids = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
        document_index = np.full(shape, -1, dtype=np.int64)
        for i, content in enumerate(contents):
            if content is None or len(content.input_ids) == 0:
                continue
            n = len(content.input_ids)
            if problem := find_row_problem(
                self.source, rows[i], content, self.vocab_size, self.isolate_documents
            ):
                raise UserError(problem)
            lengths = content.document_lengths if self.isolate_documents else np.array([n])
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
            input_ids[i, :n] = content.input_ids
            labels[i, : n - 1] = without_first_tokens(content.labels, lengths)[1:]
            position_ids[i, :n] -= np.repeat(starts, lengths)
            position_ids[i, n:] -= n
            document_index[i, :n] = np.repeat(np.arange(len(lengths)), lengths)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "document_index": torch.from_numpy(document_index),
            "row_index": torch.tensor([-1 if row is None else row for row in rows]),
            "num_tokens": sum(len(c.input_ids) for c in contents if c is not None),
            "problem": None,
        }


class _RowNumbers:
    """A data set whose items are their own numbers: the collator reads the rows."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitems__(self, rows: list[int | None]) -> list[int | None]:
        return rows


def make_loader(
    source: RowSource, sampler: Any, collator: Collator, num_workers: int, pin_memory: bool
) -> Any:
    """A torch DataLoader over micro-batches; signals are left to the main process."""
    return torch.utils.data.DataLoader(
        _RowNumbers(len(source)),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Its own generator: drawing the workers' seed from the global one would shift dropout after a resume.
        generator=torch.Generator(),
        prefetch_factor=4 if num_workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
