"""Input files: finding them, cutting them into shards, and reading lines with their numbers."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from colossal_llama.corpus.parquet import SUFFIX as PARQUET
from colossal_llama.corpus.parquet import read_rows
from colossal_llama.corpus.storage import (
    NOT_A_FILE,
    READ_BUFFER_BYTES,
    InputFile,
    Manifest,
    identity,
    list_input,
    open_range,
    stat_file,
)
from colossal_llama.utils.console import log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import join_names

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", PARQUET)
# Names of files that may well be meant as input, though they are not read.
SIMILAR_NAME = re.compile(r"[^.].*\.(jsonl?|jsonlines|ndjson|parquet|csv|tsv)(\.\w+)?", re.IGNORECASE)
MAX_NAMED_FILES = 20
UTF8_BOM = b"\xef\xbb\xbf"
# Small enough that a small corpus keeps every worker busy to the end, and never more shards than that.
MIN_SHARD_BYTES = 2 << 20
MAX_SHARDS = 16384
MIN_PARQUET_SHARD_BYTES = 32 << 20  # row groups are rarely smaller, and each shard reads the file's index
ZSTD_CHUNK_BYTES = 1 << 16  # may unpack to a thousand times as much


@dataclass(frozen=True)
class Shard:
    """A part of an input file: the lines that start at the bytes `start` ≤ … < `end`.

    A compressed file can only be read from its beginning, so it is one shard. Of a Parquet file, a
    shard is the rows of the row groups that start there. Shards depend on the files alone, not on the number
    of workers. `size` and `version` are those of the file when the shards were made; see `InputFile`.
    """

    path: str
    input_dir: int
    start: int
    end: int
    size: int
    version: int | str


def find_input_files(
    directories: Sequence[Path | str], recursive: bool | None = None
) -> list[list[InputFile]]:
    """The input files of each directory or URL, sorted by their paths below it; says what is not read.

    Args:
        recursive: read the directories below too; None where the command has no flag for that.

    Raises:
        UserError: a directory without any, one that is given twice or can't be listed, a directory below that
            holds input which would not be read, a link to nothing, a file that is there packed and unpacked,
            or `.zst` files without `zstandard`.
    """
    problems, found = [], []
    given = [identity(directory) for directory in directories]
    # A directory that is read, by itself or below another one, is not read again.
    seen = dict.fromkeys(given, "given as a directory of its own")
    for number, directory in enumerate(directories):
        if given[number] in given[:number]:
            problems.append(f"--data_input_dirs {directory}: given twice; its records would count twice")
        try:
            manifest = list_input(directory, SUFFIXES, bool(recursive), seen)
        except UserError as error:
            problems += [f"--data_input_dirs {problem}" for problem in error.problems]
            continue
        problems += _find_missed_and_doubled(directory, manifest, recursive)
        _report_left_out(directory, manifest)
        found.append(list(manifest.files.values()))
    compressed = [file.path for files in found for file in files if file.name.endswith(".zst")]
    if compressed and _import_zstandard() is None:
        problems.append(f"{compressed[0]}: reading .zst needs a library: pip install zstandard")
    if problems:
        raise UserError(problems)
    return found


def _find_missed_and_doubled(directory: Path | str, manifest: Manifest, recursive: bool | None) -> list[str]:
    """Problems with records that would be left out, or counted twice."""
    where = f"--data_input_dirs {directory}"
    problems = []
    if manifest.subdirectories:
        name, file = next(iter(manifest.subdirectories.items()))
        others = len(manifest.subdirectories) - 1
        remedy = "give it as a directory of its own"
        if recursive is not None:
            remedy += ", or use --recursive"
        problems.append(
            f"{where}: the directory {name} in it holds input ({file}) that would not be read"
            + (f", and so do {others:,} more" if others else "")
            + f"; {remedy}"
        )
    elif not manifest.files:
        problems.append(f"{where}: holds no {', '.join('*' + s for s in SUFFIXES)} file")
    problems += [
        f"{where}: holds both {name} and {name}{packing}; its records would count twice"
        for name in manifest.files
        for packing in (".gz", ".zst")
        if f"{name}{packing}" in manifest.files
    ]
    problems += [
        f"{directory}/{name}: a link to {target}, which is not there; fix or remove it"
        for name, target in manifest.broken_links.items()
    ]
    return problems


def _report_left_out(directory: Path | str, manifest: Manifest) -> None:
    """Names everything that is not read: a warning where it may be meant as input."""
    similar: list[str] = []
    by_reason: dict[str, list[str]] = {}
    for name, reason in manifest.left_out:
        base = name.rstrip("/").rpartition("/")[2]
        if SIMILAR_NAME.fullmatch(base) and name not in manifest.files and reason != NOT_A_FILE:
            similar.append(name.rstrip("/"))
        else:
            by_reason.setdefault(reason, []).append(name)
    if similar:
        warn(
            f"--data_input_dirs {directory}: {join_names(similar, MAX_NAMED_FILES)} not read: "
            f"input is what ends in {', '.join(SUFFIXES)}"
        )
    if by_reason:
        parts = [f"{join_names(names, MAX_NAMED_FILES)} ({reason})" for reason, names in by_reason.items()]
        log(f"{directory}: left out: {'; '.join(parts)}")


def make_shards(files: list[list[InputFile]]) -> list[Shard]:
    """Cuts the files (by input directory) into shards, in the order of the input; see `Shard`."""
    total = sum(file.size for directory in files for file in directory)
    step = max(MIN_SHARD_BYTES, -(-total // MAX_SHARDS))
    shards = []
    for input_dir, directory in enumerate(files):
        for file in directory:
            whole = not file.name.endswith((".jsonl", PARQUET))
            length = max(step, MIN_PARQUET_SHARD_BYTES) if file.name.endswith(PARQUET) else step
            for start in range(0, 1 if whole else max(file.size, 1), length):
                end = file.size if whole else min(start + length, file.size)
                shards.append(Shard(file.path, input_dir, start, end, file.size, file.version))
    return shards


def read_records(shard: Shard, fields: Sequence[str] = ()) -> Iterator[bytes | dict[str, Any]]:
    """The lines of a shard, as of `read_lines`, or the rows of a Parquet file.

    Args:
        fields: those of a record that are wanted; others may be missing from rows.

    Raises:
        UserError: as of `read_lines`.
    """
    if not shard.path.endswith(PARQUET):
        yield from read_lines(shard)
        return
    yield from read_rows(shard.path, shard.size, shard.start, shard.end, fields)
    _refuse_changed(shard)


def read_lines(shard: Shard) -> Iterator[bytes]:
    """The lines of a shard, line ends included; a byte order mark at the beginning of the file is removed.

    Raises:
        UserError: a compressed file that is damaged, a file that changed since the shards were made, or one
            that can't be read here.
    """
    try:
        with _open(shard) as file:
            if shard.path.endswith(".jsonl"):
                yield from _read_plain_lines(file, shard)
            else:
                for number, line in enumerate(file):
                    yield line.removeprefix(UTF8_BOM) if number == 0 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{shard.path}: damaged file: {error}; compress it again") from None
    _refuse_changed(shard)


def _refuse_changed(shard: Shard) -> None:
    now = stat_file(shard.path)
    if (now.size, now.version) != (shard.size, shard.version):
        raise UserError(f"{shard.path}: changed while it was read; run the command again")


def _read_plain_lines(file: BinaryIO, shard: Shard) -> Iterator[bytes]:
    position = shard.start
    if position > 0:
        # The line that holds the byte before the shard started in an earlier one.
        file.seek(position - 1)
        position += len(file.readline()) - 1
    while position < shard.end:
        line = file.readline()
        if not line:
            return
        yield line.removeprefix(UTF8_BOM) if position == 0 else line
        position += len(line)


@contextlib.contextmanager
def _open(shard: Shard) -> Iterator[Any]:
    with open_range(shard.path, shard.size, shard.end) as file:
        if not shard.size and not shard.path.endswith(".jsonl"):
            raise EOFError("it is empty")  # as a broken download is; the libraries take it for no data
        if shard.path.endswith(".gz"):
            with gzip.open(file) as unpacked:
                yield io.BufferedReader(unpacked, READ_BUFFER_BYTES)
        elif shard.path.endswith(".zst"):
            yield io.BufferedReader(_ZstdFile(file), READ_BUFFER_BYTES)
        else:
            yield file


class _ZstdFile(io.RawIOBase):
    """Unpacks a `.zst` file of one or more frames; `EOFError` when it ends inside one.

    (The library's own reader takes the end of a truncated file for the end of the data.)
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.zstandard = _import_zstandard()
        self.frame: Any = None  # the frame that is being unpacked, None between two
        self.packed = b""
        self.unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.unpacked:
            if not self.packed:
                self.packed = self.file.read(ZSTD_CHUNK_BYTES)
                if not self.packed:
                    if self.frame is not None:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            if self.frame is None:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.unpacked = memoryview(self.frame.decompress(self.packed))
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self.packed = self.frame.unused_data if self.frame.eof else b""
            if self.frame.eof:
                self.frame = None
        size = min(len(buffer), len(self.unpacked))
        buffer[:size] = self.unpacked[:size]
        self.unpacked = self.unpacked[size:]
        return size


def _import_zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        return None
    return zstandard
