"""Puts a set of files into a directory such that a killed run never leaves something that looks finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from colossal_llama.utils.files import remove_name, sync_directory, with_filename_in_errors


def place_files(directory: Path, contents: Mapping[str, bytes], owned: Sequence[str]) -> None:
    """Writes `contents` aside, then moves them in.

    A directory that does not exist yet appears complete in one rename. In one that does (it may be a mount
    point, or all that may be written to), the files named last in `contents` go first and come back last, so
    that until the end it can't be loaded.

    Args:
        contents: name relative to the directory -> bytes; the last ones are those without which nothing can
            be loaded.
        owned: names that this program may remove from the directory: an earlier run's leftovers.
    """
    directory = directory.resolve()
    is_new = not directory.exists()
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = (directory.parent if is_new else directory) / f".{directory.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run left
    aside.mkdir()
    try:
        for name, content in contents.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            with with_filename_in_errors(directory / name), open(aside / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        parents = {Path(name).parent for name in contents}
        for parent in parents:
            sync_directory(aside / parent)
        if is_new:
            os.replace(aside, directory)
        else:
            for name in reversed([*owned, *contents]):
                remove_name(directory, name)
            for name in contents:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(aside / name, directory / name)
            for parent in parents:
                sync_directory(directory / parent)
        sync_directory(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
