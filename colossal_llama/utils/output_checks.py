"""Whether outputs can be written, asked before hours of work and not after.

Each function returns the reason why not, as the end of a message, or None.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def why_not_output_directory(directory: Path) -> str | None:
    """Why `directory`, which need not exist yet, cannot be an output directory; None when it can.

    Judged by its name, links and permissions; nothing is written (see `why_not_writable`).
    """
    try:
        wanted = existing = directory.resolve()  # a link to what is not there yet: that is what will be made
    except (OSError, RuntimeError):
        return "is a link that leads back to itself"
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return "is not a directory" if existing == wanted else f"{existing} is not a directory"
    try:
        str(wanted).encode("utf-8")
    except UnicodeEncodeError:
        return "its path is not UTF-8 text, which the libraries need; choose another name"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} can't be written to"
    return None


def why_not_output_file(path: Path, is_ours: Callable[[Any], bool]) -> str | None:
    """Why `path`, which need not exist yet, cannot be an output file; None when it can.

    Args:
        is_ours: see `why_not_replaceable`.
    """
    if reason := why_not_output_directory(path.parent):
        return reason
    return "is a directory" if path.is_dir() else why_not_replaceable(path, is_ours)


def why_not_replaceable(path: Path, is_ours: Callable[[Any], bool]) -> str | None:
    """Why an existing file must not be replaced; None when it may be, is empty, or does not exist.

    Args:
        is_ours: whether the first JSON value of a file shows that the same program wrote it earlier.
    """
    if not path.is_file():  # a device such as /dev/stdout is not a file either
        return None
    try:
        text = path.read_text(encoding="utf-8").lstrip()
        if not text or is_ours(json.JSONDecoder().raw_decode(text)[0]):
            return None
    except OSError as error:
        return error.strerror
    except (ValueError, TypeError):  # no JSON, no text even; or JSON of another shape than `is_ours` expects
        pass
    return "is there already, and this script did not write it; choose another name, or remove it first"


def why_not_writable(directory: Path) -> str | None:
    """Why a trial of writing into `directory`, which need not exist yet, fails; None when it succeeds.

    The trial is a file without a name, which leaves no trace. Permissions alone do not reveal a file system
    that is read-only, or that root may not write to either.
    """
    nearest = next(place for place in (directory, *directory.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest}: {error.strerror}"
