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
from dataclasses import dataclass, field, replace
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
NOT_A_FILE = "not a regular file"


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


@dataclass
class Manifest:
    """What is in an input directory. Names are paths below it; those of directories end with a slash.

    Args:
        files: input by name, in the order of the names.
        left_out: what is not read, and why.
        subdirectories: those that hold input and were not to be read, with one of their files.
        broken_links: links by an input file's name to nothing, and where they point.
    """

    files: dict[str, InputFile] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    subdirectories: dict[str, str] = field(default_factory=dict)
    broken_links: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Entry:
    """`reason`: why it is not read. `location`: path or URL."""

    name: str
    location: str
    is_directory: bool = False
    reason: str | None = None
    link: str | None = None


def list_input(
    directory: Path | str,
    suffixes: tuple[str, ...],
    recursive: bool = False,
    seen: dict[str, str] | None = None,
) -> Manifest:
    """The files with these suffixes in a directory or behind a URL, and everything else that is there.

    Args:
        recursive: read directories below too. Hidden ones are not, nor what a prepare script wrote.
        seen: directories that are not to be entered, by `identity`, with the reason; those that are read are
            added, so that none is read twice.

    Raises:
        UserError: a directory or URL that can't be listed.
    """
    seen = {} if seen is None else seen
    manifest = Manifest()
    paths: dict[str, str] = {}
    for entry in _walk(str(directory), "", seen, recursive):
        if entry.is_directory:  # not entered
            files = (
                e.name for e in _walk(entry.location, entry.name, dict(seen), True) if _is_input(e, suffixes)
            )
            first = next(files, None)
            if first is None:
                manifest.left_out.append((entry.name, "no input file in it"))
            else:
                manifest.subdirectories[entry.name] = first
        elif _is_input(entry, suffixes):
            paths[entry.name] = entry.location
        elif entry.link is not None and entry.name.endswith(suffixes):
            manifest.broken_links[entry.name] = entry.link
        else:
            reason = entry.reason or f"not {', '.join('*' + suffix for suffix in suffixes)}"
            manifest.left_out.append((entry.name, reason))
    # One by one as the workers will: a listing may have other details, or none at all.
    names = sorted(paths)
    with ThreadPoolExecutor(STAT_THREADS if is_url(directory) else 1) as pool:
        manifest.files = dict(zip(names, pool.map(stat_file, [paths[name] for name in names]), strict=True))
    empty = [name for name, file in manifest.files.items() if file.size == 0]
    manifest.left_out += [(name, "empty") for name in empty]
    manifest.left_out.sort()
    return manifest


def identity(directory: Path | str) -> str:
    """The same for two names of one directory."""
    if not is_url(directory):
        return str(Path(directory).resolve())
    with contextlib.suppress(UserError):  # which listing it raises again
        filesystem, path = _open_filesystem(str(directory))
        return filesystem.unstrip_protocol(path.rstrip("/"))
    return str(directory).rstrip("/")


def _is_input(entry: _Entry, suffixes: tuple[str, ...]) -> bool:
    return not entry.is_directory and entry.reason is None and entry.name.endswith(suffixes)


def _walk(directory: str, prefix: str, seen: dict[str, str], recursive: bool) -> Iterator[_Entry]:
    """Everything in a directory; directories below are entered, or given as they are."""
    entries = _remote_entries(directory) if is_url(directory) else _local_entries(directory)
    for entry in entries:
        if not entry.is_directory:
            yield replace(entry, name=prefix + entry.name)
            continue
        name = f"{prefix}{entry.name}/"
        key = identity(entry.location)
        reason = entry.reason or seen.get(key)
        if reason is None and entry.name.startswith("."):
            reason = "hidden"
        if reason is None and not is_url(entry.location) and _is_prepared(Path(entry.location)):
            reason = "output of a prepare script"
        if reason is not None:
            yield replace(entry, name=name, is_directory=False, reason=reason)
        elif not recursive:
            yield replace(entry, name=name)
        else:
            seen[key] = f"the same directory as {name}"
            is_empty = True
            for below in _walk(entry.location, name, seen, True):
                is_empty = False
                yield below
            if is_empty:
                yield replace(entry, name=name, is_directory=False, reason="empty")


def _is_prepared(directory: Path) -> bool:
    is_output = (directory / "stats.json").is_file() or (directory / "cache" / "run.json").is_file()
    return is_output and (directory / "jsonl").is_dir()


def _local_entries(directory: str) -> list[_Entry]:
    entries = []
    try:
        paths = sorted(Path(directory).absolute().iterdir())
    except PermissionError as error:
        raise UserError(f"{directory}: can't be read: {error.strerror}") from None
    for path in paths:
        # Links are not followed in the name, which says how a file is read.
        if path.is_dir():
            entries.append(_Entry(path.name, str(path), is_directory=True))
        elif path.is_file():
            entries.append(_Entry(path.name, str(path)))
        elif path.is_symlink():
            target = str(path.readlink())
            reason = f"a link to {target}, which is not there"
            entries.append(_Entry(path.name, str(path), reason=reason, link=target))
        else:
            entries.append(_Entry(path.name, str(path), reason=NOT_A_FILE))
    return entries


def _remote_entries(url: str) -> list[_Entry]:
    filesystem, path = _open_filesystem(url)
    path = path.rstrip("/")
    with _explained(url):
        filesystem.invalidate_cache()
        found = filesystem.ls(path + "/" if url.endswith("/") else path, detail=True)
        if [entry["name"].rstrip("/") for entry in found] == [path] and _is_file(found[0]):
            raise UserError(f"{url}: is a file; give the URL of its directory")
    entries = []
    for entry in sorted(found, key=lambda entry: entry["name"]):
        full = entry["name"].rstrip("/")
        name = full.rpartition("/")[2]
        if full == path or name.startswith(("?", "#")):  # the directory itself, or the sort links of a page
            continue
        location = filesystem.unstrip_protocol(entry["name"])
        if _is_file(entry):
            entries.append(_Entry(name, location))
        elif entry.get("type") == "directory":
            reason = None if full.startswith(path + "/") else "not below this directory"
            entries.append(_Entry(name, location, is_directory=True, reason=reason))
        else:
            entries.append(_Entry(name, location, reason=NOT_A_FILE))
    return entries


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
