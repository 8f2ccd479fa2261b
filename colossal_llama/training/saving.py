"""Files of a checkpoint: collected while training pauses, written beside it.

A `FilePlan` holds what one process has to write, copied so that training may go on; `run` writes it, makes it
durable and returns sizes and checksums. `BackgroundWrite` runs one in a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from colossal_llama.model.weight_files import CHUNK_BYTES, TensorInfo, dtype_name, write_header

# (bytes, CRC-32) by path below the checkpoint.
Listing = dict[str, tuple[int, int]]


class CheckedFile:
    """A new file that counts and checksums what is written to it; durable once closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = self.checksum = 0

    def __enter__(self) -> CheckedFile:
        self._file = open(self.path, "wb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            block = view[start : start + CHUNK_BYTES]
            self.checksum = zlib.crc32(block, self.checksum)
            with self._named_errors():
                while block:
                    block = block[self._file.write(block) :]
        self.num_bytes += len(view)

    def __exit__(self, *exception: object) -> None:
        with self._named_errors(), self._file:
            if exception[0] is None:
                os.fsync(self._file.fileno())

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """A full disk shows in `write` and `fsync`, whose errors don't say which file it was."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> CheckedFile:
    """Writes CPU tensors as they lie in memory, without the second copy that `save_file` makes."""
    infos = [TensorInfo(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    with CheckedFile(path) as file:
        write_header(infos, file, metadata)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return file


def checksum_file(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


@dataclass
class FilePlan:
    """What one process writes below `directory`.

    Attributes:
        copies: tensors are copied when they are added, since training will change them before they are
            written.
        location: weight name -> (file name, bytes), of the weight files in this plan.
    """

    directory: Path
    copies: bool
    location: dict[str, tuple[str, int]] = field(default_factory=dict)
    _jobs: list[Callable[[], Listing]] = field(default_factory=list)

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the CPU; a copy where the plan needs one."""
        held = tensor.detach().contiguous()
        if held.device.type == "cpu" and self.copies:
            return held.clone()
        return held.cpu()

    def add_tensors(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Adds a safetensors file; its tensors have gone through `hold`."""

        def write() -> Listing:
            file = write_safetensors(self.directory / name, tensors, metadata)
            tensors.clear()
            return {name: (file.num_bytes, file.checksum)}

        self._jobs.append(write)

    def add_bytes(self, name: str, content: bytes) -> None:
        def write() -> Listing:
            with CheckedFile(self.directory / name) as file:
                file.write(content)
            return {name: (file.num_bytes, file.checksum)}

        self._jobs.append(write)

    def add_library_files(self, subdirectory: str, write_files: Callable[[Path], Any]) -> None:
        """Adds what a library writes into a directory by itself; `write_files` must not touch the model."""

        def write() -> Listing:
            # Beside the others' files, which may be half written.
            own = Path(tempfile.mkdtemp(prefix=".files-", dir=self.directory))
            target = self.directory / subdirectory
            target.mkdir(parents=True, exist_ok=True)
            write_files(own)
            moved = [path.rename(target / path.name) for path in own.iterdir()]
            own.rmdir()
            return list_files(self.directory, moved)

        self._jobs.append(write)

    def run(self) -> Listing:
        """Writes everything; raises OSError that names the file."""
        listing: Listing = {}
        for job in self._jobs:
            try:
                listing.update(job())
            except OSError:
                raise
            except Exception as error:  # libraries wrap a full disk in errors of their own
                raise OSError(None, str(error) or type(error).__name__, str(self.directory)) from error
        self._jobs.clear()
        return listing


def list_files(directory: Path, paths: Sequence[Path]) -> Listing:
    """Makes files durable; sizes and checksums by path below `directory`."""
    listing: Listing = {}
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        listing[str(path.relative_to(directory))] = (path.stat().st_size, checksum_file(path))
    return listing


class BackgroundWrite:
    """Runs a plan, in a thread unless `inline`; `wait` gives what it wrote or raises what stopped it."""

    def __init__(self, plan: FilePlan, inline: bool) -> None:
        self.plan, self.listing = plan, Listing()
        self.failure: OSError | None = None
        self.seconds = 0.0
        self._thread: threading.Thread | None = None
        if inline:
            self._run()
        else:
            self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            self.listing = self.plan.run()
        except OSError as error:
            self.failure = error
        self.seconds = time.perf_counter() - started

    @property
    def is_done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
