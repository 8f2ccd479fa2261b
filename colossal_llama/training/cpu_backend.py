"""Lets colossalai 0.5.0 train on a machine without a GPU, through gloo.

colossalai reaches for CUDA streams, for collectives that gloo lacks and for kernels that are only offered
on a GPU. Everything that it misses is supplied here, so any layout can be rehearsed on a laptop. Nothing
in this module is used where CUDA is available.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


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


def enable_cpu_training() -> None:
    """Installs the CPU accelerator and the missing pieces; call it before the booster is imported,
    once or often.
    """
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
    _compose_missing_collectives()
    _mend_pipeline_p2p()
    _skip_zero_device_check()


def _skip_zero_device_check() -> None:
    """Low-level ZeRO asserts that the accelerator is called cuda or npu, for no other reason; keep
    its dtype check.
    """
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    def check_dtypes(self: LowLevelZeroOptimizer) -> None:
        for group in self.optim.param_groups:
            for param in group["params"]:
                if not getattr(param, "skip_zero_check", False) and param.dtype != self._dtype:
                    raise TypeError(f"ZeRO needs one dtype: {self._dtype} and {param.dtype} are mixed")

    LowLevelZeroOptimizer._sanity_checks = check_dtypes


def _mend_pipeline_p2p() -> None:
    """colossalai's p2p reads names that only builds with Huawei's HCCL define."""
    import torch.distributed.distributed_c10d as c10d

    if not hasattr(c10d.Backend, "HCCL"):
        c10d.Backend.HCCL = "hccl"
    if not hasattr(dist, "is_hccl_available"):
        dist.is_hccl_available = lambda: False


class _FinishedWork:
    """The handle of a collective that has already run."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _compose_missing_collectives() -> None:
    """gloo in torch 2.5 lacks reduce-scatter and all-to-all: composed from all-reduce and all-gather."""
    if getattr(dist, "_composed_for_gloo", False):
        return

    def finish(async_op: bool) -> _FinishedWork | None:
        return _FinishedWork() if async_op else None

    def for_gloo(composed: Callable, original: Callable) -> Callable:
        def call(
            output: Any, input: Any, *args: Any, group: Any = None, async_op: bool = False, **kwargs: Any
        ):
            if dist.get_backend(group) != "gloo":
                return original(output, input, *args, group=group, async_op=async_op, **kwargs)
            composed(output, input, *args, group=group, **kwargs)
            return finish(async_op)

        return call

    def reduce_scatter_tensor(output, input, op=dist.ReduceOp.SUM, group=None):
        total = input.clone()
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.view(dist.get_world_size(group), -1)[dist.get_rank(group)].view_as(output))

    def reduce_scatter(output, input_list, op=dist.ReduceOp.SUM, group=None):
        total = torch.stack([tensor.contiguous() for tensor in input_list])
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total[dist.get_rank(group)])

    def all_to_all(output_list, input_list, group=None):
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        flat = torch.cat([tensor.reshape(-1) for tensor in input_list])
        sizes = torch.tensor([tensor.numel() for tensor in input_list])
        all_sizes = [torch.empty_like(sizes) for _ in range(world_size)]
        dist.all_gather(all_sizes, sizes, group=group)
        longest = max(int(each.sum()) for each in all_sizes)
        padded = torch.nn.functional.pad(flat, (0, longest - flat.numel()))
        gathered = [torch.empty_like(padded) for _ in range(world_size)]
        dist.all_gather(gathered, padded, group=group)
        for source in range(world_size):
            start = int(all_sizes[source][:rank].sum())
            end = start + int(all_sizes[source][rank])
            output_list[source].copy_(gathered[source][start:end].view_as(output_list[source]))

    def all_to_all_single(output, input, output_split_sizes=None, input_split_sizes=None, group=None):
        world_size = dist.get_world_size(group)
        send = list(input.split(input_split_sizes or input.size(0) // world_size))
        receive = list(output.split(output_split_sizes or output.size(0) // world_size))
        all_to_all(receive, send, group=group)

    for composed in (reduce_scatter_tensor, reduce_scatter, all_to_all, all_to_all_single):
        setattr(dist, composed.__name__, for_gloo(composed, getattr(dist, composed.__name__)))
    dist._composed_for_gloo = True
