"""Files that appear whole or not at all, and locks on output directories."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama.utils.errors import UserError


def aside_path(path: Path) -> Path:
    """A hidden name beside `path` that nobody else, on any machine, writes to: `.NAME.HEX.tmp`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def with_filename_in_errors(path: Path | str) -> Iterator[None]:
    """Adds `path` to an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        if error.errno is None:  # numpy reports how many bytes were written, but no error number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
        error.filename = str(path)
        raise


def wait_for_file(path: Path, seconds: float = 60.0) -> Path:
    """`path`, once it can be seen.

    A network file system may hide for a while (NFS: up to a minute) what another machine has just made;
    listing the directory brings it up to date.

    Raises:
        FileNotFoundError: it was not there in all that time.
    """
    deadline = time.monotonic() + seconds
    while not path.exists():
        with contextlib.suppress(FileNotFoundError):
            os.listdir(path.parent)
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        time.sleep(0.1)
    return path


def replace_path(aside: Path, final: Path) -> None:
    """Renames a file or directory to a name that may be taken; what had that name is removed.

    Several processes may do this at the same time: the last one stays, whole.
    """
    while True:
        trash = aside_path(final)
        with contextlib.suppress(FileNotFoundError):
            os.rename(final, trash)
        try:
            os.replace(aside, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        finally:
            remove_path(trash)


def remove_path(path: Path) -> None:
    """Removes a file or a whole directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_name(directory: Path, name: str) -> None:
    """Removes `name`, relative to `directory`, if it exists; a link is removed, not what it leads to."""
    top = directory / Path(name).parts[0]
    (top if top.is_symlink() else directory / name).unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Writes to another name, syncs and renames: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_path(path)
    try:
        with with_filename_in_errors(path), open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Indented UTF-8 JSON with a final newline, written atomically."""
    write_text_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, name: str | None = None) -> Any:
    """Reads JSON, after a byte order mark or not.

    Args:
        name: of the file in messages; None for its path.

    Raises:
        UserError: naming file and line when it is not JSON.
    """
    name = str(path) if name is None else name
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{name}: no such file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{name}:{error.lineno}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{name}: not valid JSON (a number too long, or nested too deeply)") from None


def read_json_object(path: Path, name: str | None = None) -> dict[str, Any]:
    """`read_json` of a file that has to hold an object; `UserError` when it holds something else."""
    value = read_json(path, name)
    if not isinstance(value, dict):
        raise UserError(f"{path if name is None else name}: not a JSON object but {json_type(value)}")
    return value


def json_type(value: Any) -> str:
    """What JSON calls the type of a value, with an article."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array"}
    return names.get(type(value), "an object")


def sync_directory(path: Path) -> None:
    """Makes renames and new names inside the directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> str | None:
    """Who holds the lock of `locked_directory` on `path`; None when nobody does. Makes nothing."""
    try:
        with open(path / ".lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
    except OSError:
        pass  # no lock, or one that cannot be read: an attempt to write will tell
    return None


@contextlib.contextmanager
def locked_directory(path: Path, purpose: str) -> Iterator[None]:
    """Holds an exclusive lock on `path` (created if missing) for as long as the block runs.

    The lock is the kernel's (`flock` on `path/.lock`): it ends with the process, however that dies.

    Raises:
        UserError: another process holds it; the message names that process and host.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(in_use_message(path, holder, purpose)) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def in_use_message(path: Path, holder: str, purpose: str) -> str:
    return f"{path}: in use by {holder}; {purpose} needs a directory of its own"
