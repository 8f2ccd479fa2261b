"""Where input files are: in local directories, or behind URLs that fsspec reads (`s3://`, `hf://`, …).

fsspec is imported only when there is a URL.
"""

from __future__ import annotations

import contextlib
import io
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from colossal_llama.utils.errors import UserError

URL = re.compile(r"([a-z][a-z0-9+.-]*)://")
# What pip installs for a kind of URL; fsspec itself and http come with `datasets`.
LIBRARIES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "hf": "huggingface_hub",
    "oss": "ossfs",
}
# What file systems call that which changes when a file does, the most telling first.
VERSION_FIELDS = (
    "ETag",
    "etag",
    "blob_id",
    "generation",
    "checksum",
    "Content-MD5",
    "Last-Modified",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
)
READ_BUFFER_BYTES = 1 << 20
FETCH_BYTES = 8 << 20  # of one request
TAIL_BYTES = 1 << 16  # beyond a shard's end, where only its last line reaches
FETCH_ATTEMPTS = 3
STAT_THREADS = 16


@dataclass(frozen=True)
class InputFile:
    """A file as it was when it was listed.

    Args:
        path: absolute path, or URL.
        size: in bytes.
        version: modification time in ns, or a remote file's tag; "" where the server gives none.
    """

    path: str
    size: int
    version: int | str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


def is_url(text: str | Path) -> bool:
    return URL.match(str(text)) is not None


def list_files(directory: Path | str, suffixes: tuple[str, ...]) -> list[InputFile]:
    """The files with these suffixes in a directory or behind a URL, not those below, sorted by name.

    Raises:
        UserError: a URL that can't be listed.
    """
    if not is_url(directory):
        paths = [p for p in Path(directory).iterdir() if p.name.endswith(suffixes) and p.is_file()]
        # Links are not followed in the name, which says how a file is read.
        return [stat_file(str(path.absolute())) for path in sorted(paths)]
    filesystem, path = _open_filesystem(str(directory))
    with _explained(str(directory)):
        filesystem.invalidate_cache()
        entries = filesystem.ls(path, detail=True)
        if [entry["name"].rstrip("/") for entry in entries] == [path.rstrip("/")] and _is_file(entries[0]):
            raise UserError(f"{directory}: is a file; give the URL of its directory")
    urls = [
        filesystem.unstrip_protocol(entry["name"])
        for entry in entries
        if entry["name"].endswith(suffixes) and _is_file(entry)
    ]
    # One by one as the workers will: a listing may have other details, or none at all.
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        return sorted(pool.map(stat_file, urls), key=lambda file: file.name)


def stat_file(path: str) -> InputFile:
    """A file as it is now.

    Raises:
        UserError: it is not there, or a remote one can't be reached.
    """
    if not is_url(path):
        with _explained(path):
            stat = Path(path).stat()
        return InputFile(path, stat.st_size, stat.st_mtime_ns)
    filesystem, remote_path = _open_filesystem(path)
    with _explained(path):
        filesystem.invalidate_cache()
        return _input_file(path, filesystem.info(remote_path))


@contextlib.contextmanager
def open_range(path: str, size: int, end: int) -> Iterator[BinaryIO]:
    """A file for reading, buffered and seekable; bytes far beyond `end` will hardly be asked for.

    Args:
        size: of the file, in bytes.
    """
    if is_url(path):
        filesystem, remote_path = _open_filesystem(path)
        yield io.BufferedReader(  # type: ignore[misc]
            _RangeFile(filesystem, remote_path, path, size, end), READ_BUFFER_BYTES
        )
        return
    with _explained(path):
        file = open(path, "rb", buffering=READ_BUFFER_BYTES)  # noqa: SIM115
    with file:
        yield file


class _RangeFile(io.RawIOBase):
    """A remote file that asks for the byte ranges that are read, and for little else."""

    def __init__(self, filesystem: Any, remote_path: str, url: str, size: int, end: int) -> None:
        self.filesystem = filesystem
        self.remote_path = remote_path
        self.url = url
        self.size = size
        self.end = end
        self.position = 0
        self.fetched_from = 0
        self.fetched = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        if self.position >= self.size:
            return 0
        start = self.position - self.fetched_from
        if not 0 <= start < len(self.fetched):
            self._fetch()
            start = 0
        part = self.fetched[start : start + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def _fetch(self) -> None:
        # The longer a last line turns out to be, the more is asked for at once.
        tail = max(TAIL_BYTES, self.position - self.end)
        stop = min(max(self.end, self.position) + tail, self.position + FETCH_BYTES, self.size)
        wanted = stop - self.position
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                data = self.filesystem.cat_file(self.remote_path, start=self.position, end=stop)
            except (FileNotFoundError, PermissionError) as error:
                raise UserError(f"{self.url}: {_describe(error)}") from None
            except Exception as error:  # every file system has its own
                if attempt == FETCH_ATTEMPTS:
                    raise UserError(
                        f"{self.url}: can't be read: {_describe(error)}; the same command goes on where this "
                        "one stopped"
                    ) from None
                time.sleep(4 ** (attempt - 1))
            else:
                break
        if len(data) != wanted:
            raise UserError(
                f"{self.url}: {len(data):,} bytes came for a range of {wanted:,}: it changed, or the server "
                "does not serve byte ranges; copy the file to a local directory"
            )
        self.fetched_from, self.fetched = self.position, memoryview(data)


def _open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec

    protocol = URL.match(url)[1]  # type: ignore[index]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        library = LIBRARIES.get(protocol)
        remedy = f"reading {protocol}:// needs a library: pip install {library}" if library else str(error)
        raise UserError(f"{url}: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}") from None


def _input_file(path: str, info: dict[str, Any]) -> InputFile:
    if info.get("size") is None:
        raise UserError(
            f"{path}: the server does not say how large it is; copy the file to a local directory"
        )
    version = next((str(info[name]) for name in VERSION_FIELDS if info.get(name)), "")
    return InputFile(path, int(info["size"]), version.strip('"'))


def _is_file(entry: dict[str, Any]) -> bool:
    return entry.get("type") == "file"


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """What goes wrong with a path as a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or directory") from None
    except Exception as error:  # every file system has its own
        if not is_url(path):
            raise
        raise UserError(f"{path}: can't be read: {_describe(error)}") from None


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
