"""Model weights on disk, a tensor at a time: safetensors and `.bin` shards in, safetensors shards out.

A safetensors file is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, data_offsets
counted from the header's end), and the tensors' bytes. Tensors that stay as they are go from file to file
inside the kernel, without passing through this process.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from colossal_llama.model.dtypes import ITEM_BYTES, safetensors_name, torch_dtype
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object
from colossal_llama.utils.messages import first_line

if TYPE_CHECKING:
    import torch

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"
BIN_INDEX = "pytorch_model.bin.index.json"
BIN_SINGLE = "pytorch_model.bin"
# In the order of preference of `from_pretrained`.
_WEIGHT_NAMES = ((SAFETENSORS_SINGLE, SAFETENSORS_INDEX), (BIN_SINGLE, BIN_INDEX))

CHUNK_BYTES = 32 * 2**20
_HEADER_ALIGNMENT = 8
_MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place in the model: its name, safetensors dtype ("BF16") and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]


class SupportsWrite(Protocol):
    def write(self, data: bytes, /) -> Any: ...


class Shard(Protocol):
    """One file of source weights."""

    path: Path
    tensors: dict[str, TensorInfo]

    def copy(self, name: str, start: int, stop: int, output: BinaryIO) -> None:
        """Appends the bytes of elements `start` to `stop` of a tensor to `output`, unchanged."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a tensor, flat, in the source's dtype."""

    def close(self) -> None: ...


class SafetensorsShard:
    """A safetensors file, read with plain file operations so that memory holds only what is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._begin: dict[str, int] = {}
        self._read_header()

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header_bytes = int.from_bytes(self._file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
            raise UserError(f"{self.path}: not a complete safetensors file ({size:,} bytes)")
        try:
            header = json.loads(self._file.read(header_bytes))
            self.metadata = header.pop("__metadata__", {})
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            for name, entry in entries:
                info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]))
                begin, end = entry["data_offsets"]
                if end - begin != info.num_bytes:
                    raise ValueError(f"tensor {name} has {end - begin} bytes instead of {info.num_bytes}")
                if 8 + header_bytes + end > size:
                    raise ValueError(f"the file ends before tensor {name} does")
                self.tensors[name] = info
                self._begin[name] = 8 + header_bytes + begin
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.path}: damaged safetensors file ({error})") from None

    def copy(self, name: str, start: int, stop: int, output: BinaryIO) -> None:
        item = ITEM_BYTES[self.tensors[name].dtype]
        copy_range(self._file, self._begin[name] + start * item, (stop - start) * item, output)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        values = torch.empty(stop - start, dtype=torch_dtype(self.tensors[name].dtype))
        item = ITEM_BYTES[self.tensors[name].dtype]
        self._file.seek(self._begin[name] + start * item)
        if self._file.readinto(memoryview(values.view(torch.uint8).numpy())) != values.numel() * item:
            raise UserError(f"{self.path}: the file ends inside tensor {name}")
        return values

    def close(self) -> None:
        self._file.close()


class BinShard:
    """A `torch.save` file, memory-mapped where its format allows, and loaded without executing any pickle."""

    def __init__(self, path: Path) -> None:
        import pickle

        import torch

        self.path = path
        mapped = True
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 can't be mapped
                mapped = False
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UserError(f"{path}: can't be loaded as plain weights ({first_line(error)})") from None
        if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise UserError(f"{path}: not a dictionary of tensors")
        self.tensors = {}
        for name, tensor in state.items():
            dtype = safetensors_name(tensor.dtype)
            if dtype is None:
                raise UserError(f"{path}: tensor {name} is {tensor.dtype}, which safetensors can't hold")
            self.tensors[name] = TensorInfo(name, dtype, tuple(tensor.shape))
        self._state = {name: tensor.contiguous() for name, tensor in state.items()}
        # Pages of these can be read from the file again; dropping any others would lose the weights.
        self._mapped = {name for name, tensor in state.items() if mapped and self._state[name] is tensor}

    def copy(self, name: str, start: int, stop: int, output: BinaryIO) -> None:
        for chunk in _chunks(start, stop, CHUNK_BYTES // ITEM_BYTES[self.tensors[name].dtype]):
            write_tensor(self._state[name].view(-1)[chunk.start : chunk.stop], output)
            self._forget(name, chunk)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        copied = self._state[name].view(-1)[start:stop].clone()
        self._forget(name, range(start, stop))
        return copied

    def _forget(self, name: str, elements: range) -> None:
        """Gives mapped pages back at once, so that the process does not seem to hold the whole shard."""
        import ctypes
        import mmap

        item = ITEM_BYTES[self.tensors[name].dtype]
        base = self._state[name].data_ptr()
        first = -(-(base + elements.start * item) // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (base + elements.stop * item) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and name in self._mapped:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED
            )

    def close(self) -> None:
        self._state.clear()


def check_index(directory: Path, flag: str) -> None:
    """Raises `UserError` where the index of a model's shards is damaged; none at all is no error here."""
    if any((directory / name).exists() for names in _WEIGHT_NAMES for name in names):
        find_shards(directory, flag)


def _read_index(path: Path) -> list[Path]:
    """The shards that an index names."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: no weight_map in it")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{path}: its weight_map names files by something else than strings; copy it again")
    paths = [path.parent / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in paths if not shard.exists()]
    if missing:
        raise UserError(f"{path}: names {', '.join(missing)}, which the directory lacks")
    return paths


def find_shards(directory: Path, flag: str) -> list[Path]:
    """The weight files of a Hugging Face model directory, in the order of preference of `from_pretrained`.

    Raises:
        UserError: there are none, or the index names files that are missing.
    """
    for single, index in _WEIGHT_NAMES:
        if (directory / single).exists():
            return [directory / single]
        if (directory / index).exists():
            return _read_index(directory / index)
    raise UserError(
        f"{flag} {directory}: no model weights ({SAFETENSORS_SINGLE}, {BIN_SINGLE} or an index of shards)"
    )


def open_shard(path: Path) -> SafetensorsShard | BinShard:
    return SafetensorsShard(path) if path.suffix == ".safetensors" else BinShard(path)


def output_name(source: Path) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    if source.suffix == ".safetensors":
        return source.name
    return source.name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"


def write_header(
    tensors: Sequence[TensorInfo], output: SupportsWrite, metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors header for tensors that follow in this order."""
    # transformers refuses files that do not say "format".
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % _HEADER_ALIGNMENT)
    output.write(len(encoded).to_bytes(8, "little") + encoded)


def write_tensor(tensor: torch.Tensor, output: BinaryIO) -> None:
    """Appends a CPU tensor's bytes."""
    import torch

    if tensor.numel():
        output.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def copy_range(source: BinaryIO, start: int, length: int, output: BinaryIO) -> None:
    """Appends `length` bytes of `source` from `start`, inside the kernel where the file systems allow it.

    Raises:
        UserError: the source ends too early.
    """
    output.flush()
    end = start + length
    start = _copy_in_kernel(source.fileno(), start, end, output.fileno())
    output.seek(0, os.SEEK_END)
    while start < end:
        block = os.pread(source.fileno(), min(CHUNK_BYTES, end - start), start)
        if not block:
            raise UserError(f"{source.name}: the file ends {end - start:,} bytes early")
        output.write(block)
        start += len(block)


def _copy_in_kernel(source: int, start: int, end: int, output: int) -> int:
    """Copies with `copy_file_range`; returns how far it came."""
    while start < end:
        try:
            copied = os.copy_file_range(source, output, min(end - start, 2**30), start)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                return start
            raise
        if not copied:
            return start
        start += copied
    return start


def iterate_chunks(tensor: TensorInfo) -> Iterator[range]:
    """Ranges of elements that cover the tensor, at most 32 MiB each."""
    return _chunks(0, tensor.num_elements, CHUNK_BYTES // ITEM_BYTES[tensor.dtype])


def _chunks(start: int, stop: int, size: int) -> Iterator[range]:
    return (range(first, min(first + size, stop)) for first in range(start, stop, size))


def sum_bytes(tensors: Iterable[TensorInfo]) -> int:
    return sum(tensor.num_bytes for tensor in tensors)
