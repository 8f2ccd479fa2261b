"""Files of a checkpoint: collected while training pauses, written beside it.

A `FileJobs` holds what one process has to write, copied so that training may continue; `run` writes it, makes
it durable and returns sizes and checksums. `BackgroundWrite` runs one in a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from colossal_llama.model.dtypes import safetensors_name
from colossal_llama.model.weight_files import CHUNK_BYTES, TensorInfo, write_header
from colossal_llama.training.memory import pinned_bytes

# In the errors of safetensors (Rust's words) and of torch.save.
_SIGNS_OF_A_DISK = ("os error", "Os {", "StorageFull", "No space left", "I/O error", "PytorchStreamWriter")

# (bytes, XXH3 checksum) by path below the checkpoint. XXH3 is several times as fast as any disk.
Manifest = dict[str, tuple[int, str]]


class SaveError(OSError):
    """A save failed, on any rank.

    Attributes:
        is_disk: the machine refused to write (a full disk, a missing permission); else it is a library, or
            this program, and no room on the disk will help.
    """

    def __init__(self, message: str, is_disk: bool) -> None:
        super().__init__(message)
        self.is_disk = is_disk


def is_disk_error(error: BaseException) -> bool:
    """Whether the operating system refused a write; libraries wrap that in errors of their own.

    >>> is_disk_error(OSError(28, "No space left on device"))
    True
    >>> is_disk_error(ValueError("the configuration is invalid"))
    False
    """
    cause = error.__cause__ if error.__cause__ is not None else error
    if isinstance(cause, OSError):
        return cause.errno is not None
    return any(sign in str(cause) for sign in _SIGNS_OF_A_DISK)


class CheckedFile:
    """A new file that counts and checksums what is written to it; durable once closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._hash = xxhash.xxh3_64()

    @property
    def checksum(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> CheckedFile:
        self._file = open(self.path, "wb", buffering=0)
        return self

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            block = view[start : start + CHUNK_BYTES]
            self._hash.update(block)
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
    infos = [TensorInfo(name, safetensors_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    with CheckedFile(path) as file:
        write_header(infos, file, metadata)
        for tensor in tensors.values():
            if tensor.numel():
                file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return file


def checksum_file(path: Path) -> str:
    """XXH3 of a file's bytes."""
    checksum = xxhash.xxh3_64()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(CHUNK_BYTES):
            checksum.update(block)
    return checksum.hexdigest()


class CopyBuffers:
    """Memory for copies, kept from save to save: fresh memory would have to be mapped page by page first.

    Copies of GPU tensors go to pinned memory, which the device writes at full speed.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._used = 0

    def start(self) -> None:
        """A new save: what the last one copied has been written."""
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._used == len(self._buffers):
            self._buffers.append(_empty_like(tensor))
        buffer = self._buffers[self._used]
        if buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[self._used] = _empty_like(tensor)
        self._used += 1
        return buffer.copy_(tensor)


def copy_bytes(tensor: torch.Tensor) -> int:
    """Memory that the copy of a tensor takes: torch's blocks of pinned memory are powers of two."""
    return pinned_bytes([tensor.nbytes]) if tensor.is_cuda else tensor.nbytes


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


@dataclass
class FileJobs:
    """What one process writes below `directory`.

    Attributes:
        copies: where tensors are copied to when they are added, since training will change them before they
            are written; None when training waits.
        location: weight name -> (file name, bytes), of the weight files in this plan.
    """

    directory: Path
    copies: CopyBuffers | None
    location: dict[str, tuple[str, int]] = field(default_factory=dict)
    _jobs: list[Callable[[], Manifest]] = field(default_factory=list)

    def hold(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the CPU; a copy where the plan needs one."""
        held = tensor.detach().contiguous()
        return held.cpu() if self.copies is None else self.copies.copy(held)

    def add_tensors(self, name: str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Adds a safetensors file; its tensors have gone through `hold`."""

        def write() -> Manifest:
            file = write_safetensors(self.directory / name, tensors, metadata)
            tensors.clear()
            return {name: (file.num_bytes, file.checksum)}

        self._jobs.append(write)

    def add_bytes(self, name: str, content: bytes) -> None:
        def write() -> Manifest:
            path = self.directory / name
            if "/" in name:
                path.parent.mkdir(exist_ok=True)
            with CheckedFile(path) as file:
                file.write(content)
            return {name: (file.num_bytes, file.checksum)}

        self._jobs.append(write)

    def add_library_files(self, subdirectory: str, write_files: Callable[[Path], Any]) -> None:
        """Adds what a library writes into a directory by itself; `write_files` must not touch the model."""

        def write() -> Manifest:
            # Beside the others' files, which may be half written.
            own = Path(tempfile.mkdtemp(prefix=".files-", dir=self.directory))
            target = self.directory / subdirectory
            target.mkdir(parents=True, exist_ok=True)
            write_files(own)
            moved = [path.rename(target / path.name) for path in own.iterdir()]
            own.rmdir()
            return list_files(self.directory, moved)

        self._jobs.append(write)

    def run(self) -> Manifest:
        """Writes everything.

        Raises:
            OSError: names the file; what a library raised is its cause, and in its text with its type.
        """
        listing: Manifest = {}
        for job in self._jobs:
            try:
                listing.update(job())
            except OSError:
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                raise OSError(None, text, str(self.directory)) from error
        self._jobs.clear()
        return listing


def list_files(directory: Path, paths: Sequence[Path]) -> Manifest:
    """Makes files durable; sizes and checksums by path below `directory`."""
    listing: Manifest = {}
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        listing[str(path.relative_to(directory))] = (path.stat().st_size, checksum_file(path))
    return listing


class BackgroundWrite:
    """Runs a plan, in a thread unless `inline`; `wait` returns what it wrote or raises what stopped it."""

    def __init__(self, plan: FileJobs, inline: bool) -> None:
        self.plan, self.listing = plan, Manifest()
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
