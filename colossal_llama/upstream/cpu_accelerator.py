"""colossalai's accelerator for machines without a GPU raises for most of what the plugins ask of it.

Broken in: colossalai 0.5.0, `CpuAccelerator`: streams, memory figures, `synchronize`, `empty_cache` and seeds
raise RuntimeError, `get_rng_state(device)` has another signature.
Shows as: every plugin but ddp fails on a CPU while boosting or in the first step.
Cure: an accelerator with all of it. A stream does nothing, since on a CPU every operation has finished when
it returns; memory is the process's.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import torch


class _NullStream:
    """Stands for a CUDA stream or event: on a CPU every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> _NullStream:
        return self

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def install_cpu_accelerator() -> None:
    """Gives colossalai the accelerator; call it before the booster is imported or used, once or often."""
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    class GlooAccelerator(CpuAccelerator):
        """colossalai's CPU accelerator with the methods that it leaves out."""

        def current_device(self) -> torch.device:
            return torch.device("cpu")

        def device_count(self) -> int:
            return 1

        def get_device_name(self, device: Any = None) -> str:
            return "cpu"

        def get_device_capability(self, device: Any = None) -> tuple[int, int]:
            return (0, 0)

        def synchronize(self, device: Any = None) -> None: ...

        def empty_cache(self) -> None: ...

        def manual_seed(self, seed: int) -> None:
            torch.manual_seed(seed)

        def manual_seed_all(self, seed: int) -> None:
            torch.manual_seed(seed)

        def get_rng_state(self, device: Any = None) -> torch.Tensor:
            return torch.get_rng_state()

        def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
            torch.set_rng_state(new_state)

        def initial_seed(self) -> int:
            return torch.initial_seed()

        def memory_allocated(self, device: Any = None) -> int:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        def max_memory_allocated(self, device: Any = None) -> int:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        def reset_peak_memory_stats(self, device: Any = None) -> None: ...

        def Stream(self, *args: Any, **kwargs: Any) -> _NullStream:
            return _NullStream()

        def Event(self, *args: Any, **kwargs: Any) -> _NullStream:
            return _NullStream()

        def current_stream(self, device: Any = None) -> _NullStream:
            return _NullStream()

        def default_stream(self, device: Any = None) -> _NullStream:
            return _NullStream()

        def set_stream(self, stream_: Any) -> None: ...

        def stream(self, stream_: Any) -> contextlib.AbstractContextManager:
            return contextlib.nullcontext()

    set_accelerator(GlooAccelerator())
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]
