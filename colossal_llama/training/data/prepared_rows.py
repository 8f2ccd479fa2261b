"""Prepared bins on disk as one memory-mapped data set."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from colossal_llama.training.data.rows import Row, RowDataset, find_row_problem
from colossal_llama.training.data.sets import RowSet, set_names
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object

PREPARED_FILE = "prepared.json"
_COLUMNS = ("input_ids", "labels", "document_lengths")
# The kernel maps at most 65,530 files into a process unless told otherwise, and an open part takes memory.
MAX_OPEN_PARTS = 4096
_DIGEST = b"digest"
_PART_NAME = re.compile(r"part-(\d+)$")


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
        sets: in order of first mention; each has bins of its own.
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
        part_tokens = [0] * len(self.paths)
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
            part_tokens[number] = int(lengths.sum())
            self.num_tokens += part_tokens[number]
            digest.update(f"{len(table)} {int(lengths.sum())} ".encode())
            for row in {0, len(table) // 2, len(table) - 1} if len(table) else ():
                for column in ("input_ids", "labels"):
                    digest.update(_values(table, column, row).astype(np.int64).tobytes())
            if (path / PREPARED_FILE).is_file():
                digest.update(table.schema.metadata[_DIGEST])
            bucket = _bucket_number(path, number)
            buckets.setdefault(bucket, []).append((int(self.starts[number]), int(self.starts[number + 1])))
        if not problems and len(self) == 0:
            problems.append(f"{flag}: the given parts hold no rows at all")
        if problems:
            raise UserError(problems)
        self.bucket_ranges = [buckets[bucket] for bucket in sorted(buckets)]
        self.fingerprint = digest.hexdigest()[:16]
        self.sets, self._set_of_part = self._find_sets(part_tokens)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _find_sets(self, part_tokens: Sequence[int]) -> tuple[list[RowSet], np.ndarray]:
        """The sets, and the number of the set of each part."""
        parents = [path.parent.resolve() for path in self.paths]
        numbers = {parent: number for number, parent in enumerate(dict.fromkeys(parents))}
        directories: dict[Path, Path] = {}
        for path, parent in zip(self.paths, parents, strict=True):
            directories.setdefault(parent, path.parent)
        sets = []
        for parent, name in zip(numbers, set_names(list(directories.values())), strict=True):
            parts = [part for part, its_parent in enumerate(parents) if its_parent == parent]
            bins: dict[int, list[tuple[int, int]]] = {}
            for part in parts:
                span = (int(self.starts[part]), int(self.starts[part + 1]))
                bins.setdefault(_bucket_number(self.paths[part], part), []).append(span)
            num_rows = sum(end - start for spans in bins.values() for start, end in spans)
            num_tokens = sum(part_tokens[part] for part in parts)
            sets.append(RowSet(name, num_rows, num_tokens, [bins[number] for number in sorted(bins)]))
        return sets, np.array([numbers[parent] for parent in parents])

    def sets_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the set that each row belongs to, [rows]."""
        return self._set_of_part[np.searchsorted(self.starts, rows, side="right") - 1]

    def row_lengths(self) -> np.ndarray:
        """Tokens of each row, [rows], in as few bytes as they fit in."""
        lengths = np.empty(len(self), dtype=np.uint16 if self.max_length < 2**16 else np.uint32)
        for part, (start, end) in enumerate(itertools.pairwise(self.starts.tolist())):
            lengths[start:end] = _row_lengths(self._table(part), "input_ids")
        return lengths

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

    def sum_lengths(self, isolated: bool) -> tuple[int, int]:
        """Sums of the documents' lengths (the rows', where documents see each other) and of their squares."""
        total = squares = 0
        for number in range(len(self.paths)):
            table = self._table(number)
            chunks = [_row_lengths(table, "input_ids")]
            if isolated and "document_lengths" in table.column_names:
                chunks = [np.from_dlpack(each.flatten()) for each in table.column("document_lengths").chunks]
            for chunk in chunks:
                lengths = chunk.astype(np.int64)
                total, squares = total + int(lengths.sum()), squares + int((lengths * lengths).sum())
        return total, squares

    def describe_row(self, index: int) -> str:
        part, row = self._locate(index)
        return f"{self.paths[part]} row {row}"


def sum_lengths(dataset: RowDataset, isolated: bool) -> tuple[float, float]:
    """`PreparedDataset.sum_lengths`; of rows that are made up, as if each was one document of mean length."""
    if isinstance(dataset, PreparedDataset):
        return dataset.sum_lengths(isolated)
    return dataset.num_tokens, dataset.num_tokens**2 / len(dataset)


def _bucket_number(part: Path, number: int) -> int:
    """N of `part-N`; the place of a part with another name."""
    match = _PART_NAME.search(part.name)
    return int(match.group(1)) if match else number


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
