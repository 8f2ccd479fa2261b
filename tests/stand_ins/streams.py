"""An accelerator whose streams and events are recorded, and what finds reads that no event orders.

On a CPU every operation has finished when it returns, so wrong order never shows. Here each operation belongs
to the stream that is current, as on a GPU, and streams know of one another only what they have waited for:

    main       write gradients ──▶ (record) ───────────────▶ read gradients    an error: nothing waits
    reduction                         (wait) ─▶ write sums
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_numbers = itertools.count()
# By torch's list (see its `use_deterministic_algorithms`), of what a language model could use.
NOT_DETERMINISTIC = {
    *("nll_loss2d_forward", "nll_loss2d_backward", "histc", "kthvalue", "median", "nanmedian", "put_", "put"),
    *("_embedding_bag", "index_reduce", "scatter_reduce", "_ctc_loss", "max_pool3d_with_indices_backward"),
}
NOT_DETERMINISTIC_IN_FLOAT = {"cumsum", "cumsum_", "bincount"}


class Stream:
    """What it has done, and what it knows of the others: number of stream -> last operation."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.number = next(_numbers)
        self.known: dict[int, int] = {}
        self._entered: list[Any] = []

    def wait_stream(self, other: Stream) -> None:
        _merge(self.known, other.known)

    def wait_event(self, event: Event) -> None:
        _merge(self.known, event.known)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _recorder().host_waits_for(self.known)

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        self._entered.append(_recorder().enter(self))
        return self

    def __exit__(self, *_: object) -> None:
        _recorder().current = self._entered.pop()


class Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.known: dict[int, int] = {}

    def record(self, stream: Stream | None = None) -> None:
        self.known = dict((stream or _recorder().current).known)

    def wait(self, stream: Stream | None = None) -> None:
        _merge((stream or _recorder().current).known, self.known)

    def synchronize(self) -> None:
        _recorder().host_waits_for(self.known)

    def query(self) -> bool:
        return True


def _merge(known: dict[int, int], other: dict[int, int]) -> None:
    for stream, operation in other.items():
        known[stream] = max(known.get(stream, 0), operation)


@dataclass
class Memory:
    """The last write to a storage and the reads since then: (stream, number of the operation, its name).

    Attributes:
        storage: kept, so that no other gets its address.
    """

    storage: torch.UntypedStorage
    write: tuple[int, int, str] | None = None
    reads: list[tuple[int, int, str]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Takes down what each operation reads and writes, and on which stream.

    Attributes:
        races: sentences, one for each pair of operations that nothing orders.
        streams: those that were used.
        nondeterministic: operations that raise on a GPU under `torch.use_deterministic_algorithms`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.main = self.current = Stream()
        self.races: list[str] = []
        self.nondeterministic: set[str] = set()
        self.host: dict[int, int] = {}
        self._count = 0
        self._memory: dict[int, Memory] = {}
        self.streams: list[Stream] = [self.main]

    def enter(self, stream: Stream) -> Stream:
        before, self.current = self.current, stream
        if stream not in self.streams:
            self.streams.append(stream)
        return before

    def host_waits_for(self, known: dict[int, int]) -> None:
        _merge(self.host, known)

    def synchronize(self) -> None:
        for stream in self.streams:
            _merge(self.host, stream.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("pin_memory"):  # there is none without a GPU
            kwargs["pin_memory"] = False
        reads, writes = _accesses(func, args, kwargs)
        # A subclass of tensors would make results its own, which it does not where nobody listens.
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        name = str(func)
        operation = name.removeprefix("aten.").partition(".")[0]
        is_float = any(tensor.is_floating_point() for tensor in reads)
        if operation in NOT_DETERMINISTIC or (operation in NOT_DETERMINISTIC_IN_FLOAT and is_float):
            self.nondeterministic.add(name)
        results = [tensor for tensor in pytree.tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        # A view of an argument is no access; a new tensor is one.
        known = {_key(tensor) for tensor in (*reads, *writes)}
        self._launch(name, reads, [*writes, *(tensor for tensor in results if _key(tensor) not in known)])
        if name.startswith("aten._local_scalar_dense"):  # the host waits for this stream
            self.host_waits_for(self.current.known)
        return result

    def _launch(self, name: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        self._count += 1
        stream = self.current
        _merge(stream.known, self.host)
        stream.known[stream.number] = self._count
        access = (stream.number, self._count, name)
        written = {_key(tensor) for tensor in writes}
        for tensor in writes:
            memory = self._find(tensor)
            for before in (*memory.reads, *([memory.write] if memory.write else [])):
                self._check(access, before, "writes")
            memory.write, memory.reads = access, []
        for tensor in reads:
            if _key(tensor) not in written:
                memory = self._find(tensor)
                if memory.write:
                    self._check(access, memory.write, "reads")
                memory.reads.append(access)

    def _check(self, access: tuple[int, int, str], before: tuple[int, int, str], what: str) -> None:
        stream, operation, name = before
        if self.current.known.get(stream, 0) < operation:
            self.races.append(f"{access[2]} {what} what {name} used on another stream: nothing orders them")

    def _find(self, tensor: torch.Tensor) -> Memory:
        key = _key(tensor)
        if key not in self._memory:
            self._memory[key] = Memory(_dense(tensor).untyped_storage())
        return self._memory[key]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._values if tensor.is_nested else tensor


def _key(tensor: torch.Tensor) -> int:
    return _dense(tensor).untyped_storage()._cdata


def _accesses(func: Any, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(tensors that an operation reads, those that it writes)."""
    reads: list[torch.Tensor] = []
    writes: list[torch.Tensor] = []
    schema, name = func._schema, str(func)
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in schema.arguments)
    for argument in schema.arguments:
        if argument.name not in named:
            continue
        tensors = [t for t in pytree.tree_leaves(named[argument.name]) if isinstance(t, torch.Tensor)]
        # Collectives do not say what they write: all that is not called input.
        is_collective = name.startswith("c10d.") and "input" not in argument.name
        if is_collective or (argument.alias_info is not None and argument.alias_info.is_write):
            writes += tensors
        elif not is_view:
            reads += tensors
    return reads, writes


_recording: Recorder | None = None


def _recorder() -> Recorder:
    assert _recording is not None, "streams are used outside of `recorded_streams`"
    return _recording


@contextlib.contextmanager
def recorded_streams() -> Iterator[Recorder]:
    """Records what the block does, with an accelerator that has streams; see `enable_cpu_training` first."""
    global _recording
    from colossalai.accelerator import api

    before = api.get_accelerator()

    class RecordingAccelerator(type(before)):  # type: ignore[misc]
        def Stream(self, *args: Any, **kwargs: Any) -> Stream:
            return Stream()

        def Event(self, *args: Any, **kwargs: Any) -> Event:
            return Event()

        def current_stream(self, device: Any = None) -> Stream:
            return _recorder().current

        def default_stream(self, device: Any = None) -> Stream:
            return _recorder().main

        def set_stream(self, stream: Stream) -> None:
            _recorder().enter(stream)

        def stream(self, stream: Stream | None) -> contextlib.AbstractContextManager:
            return contextlib.nullcontext() if stream is None else stream

        def synchronize(self, device: Any = None) -> None:
            _recorder().synchronize()

    with Recorder() as recorder:
        _recording = recorder
        api.set_accelerator(RecordingAccelerator())
        try:
            yield recorder
        finally:
            api.set_accelerator(before)
            _recording = None
