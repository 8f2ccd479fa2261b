"""Gemini runs on GPUs only, since it tells the device's memory from the host's by the names "cuda" and "cpu".

Broken in: colossalai 0.5.0: chunks, their manager and the placement policies compare `device.type`; the
placement "auto" also measures memory through `torch.cuda`.
Shows as: a KeyError or a failed assertion while boosting, or in the first step, on a machine without a GPU.
Cure: two memories on a CPU. `cpu:0` stands for the GPU and `cpu` for the host, what is moved between them is
copied, and the modules of Gemini, no others, see an accelerator that calls itself "cuda". A tensor never
remembers the index of its device, so where a chunk is must be read from `Chunk.device_type`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")


def let_gemini_run_on_cpus() -> None:
    """Call it before Gemini's plugin is made, once or often; not where CUDA is available."""
    import colossalai.zero.gemini

    if getattr(colossalai.zero.gemini, "_runs_on_cpus", False):
        return
    _present_accelerator_as_cuda()
    _move_chunks_by_index()
    _measure_chunks_instead_of_cuda()
    colossalai.zero.gemini._runs_on_cpus = True


def pretend_device_memory(device_bytes: int | None = None) -> None:
    """Says what the placement "auto" fills before it moves chunks to the host.

    Args:
        device_bytes: of the pretended GPU; None for this process's share of the machine's memory.
    """
    import psutil
    from colossalai.legacy.utils import memory

    share = psutil.virtual_memory().total // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    capacity = share if device_bytes is None else device_bytes
    memory.colo_device_memory_capacity = lambda device: capacity


def _present_accelerator_as_cuda() -> None:
    from colossalai.accelerator import get_accelerator

    class DeviceAccelerator:
        name = "cuda"

        def get_current_device(self) -> torch.device:
            return DEVICE

        def __getattr__(self, name: str) -> Any:
            return getattr(get_accelerator(), name)

    accelerator = DeviceAccelerator()
    for name, module in list(sys.modules.items()):
        if name.startswith("colossalai.zero.gemini") and hasattr(module, "get_accelerator"):
            module.get_accelerator = lambda: accelerator


def _move_chunks_by_index() -> None:
    """Replaces what decides by `device.type` where a chunk's shard goes, by the same rules.

    As on a GPU, a shard is in `cuda_shard` or in `cpu_shard` and the other is None, so code that has not
    moved a chunk before it uses it fails here too. (Pinned chunks keep their `cpu_shard`; there are none on a
    CPU but in tests.)
    """
    from colossalai.zero.gemini.chunk import Chunk, ChunkManager

    close_on_host = Chunk.close_chunk

    def close_chunk(self: Chunk) -> None:
        close_on_host(self)  # takes `cpu:0` for the host, and leaves every shard there
        if self.shard_device == DEVICE and not self.keep_gathered:
            self.cuda_shard, self.cpu_shard = self.cpu_shard, None

    def shard_move(
        self: Chunk, device: torch.device, force_copy: bool = False, non_blocking: bool = False
    ) -> None:
        assert not self.is_gathered
        if not self.optim_sync_flag:  # the optimizer ran on the host and changed the master chunk alone
            assert device == DEVICE, "the weights of this step are in the master chunk alone"
            self.cuda_shard = self.paired_chunk.cpu_shard.to(self.dtype)
            self.optim_sync_flag = True
        elif device == DEVICE:
            if self.cuda_shard is None:
                self.cuda_shard = self.cpu_shard.clone()
        else:
            if self.cuda_shard is None:
                return
            if not self.pin_memory:
                self.cpu_shard = self.cuda_shard.clone()
            elif force_copy or not self.cpu_vis_flag:
                self.cpu_shard.copy_(self.cuda_shard)
            self.cpu_vis_flag = True
            self.cuda_shard = None
            return
        if not self.pin_memory:
            self.cpu_shard = None

    def move_chunk(
        self: ChunkManager,
        chunk: Chunk,
        device: torch.device,
        force_copy: bool = False,
        async_move: bool = False,
    ) -> None:
        is_on_device = chunk.device_type == "cuda"
        if not chunk.can_move or is_on_device == (device == DEVICE):
            return
        before = chunk.memory_usage
        chunk.shard_move(device, force_copy)
        for place, size in chunk.memory_usage.items():
            self.total_mem[place] += size - before[place]

    Chunk.close_chunk, Chunk.shard_move = close_chunk, shard_move
    ChunkManager.move_chunk = move_chunk


def _measure_chunks_instead_of_cuda() -> None:
    """The device of a CPU holds chunks and nothing else, as far as the placement "auto" is concerned."""
    from colossalai.zero.gemini.memory_tracer import ChunkMemStatsCollector

    class ChunkMemoryMonitor:
        def __init__(self, chunk_manager: Any) -> None:
            self._chunk_manager = chunk_manager

        def start(self) -> None: ...

        def finish(self) -> int:
            return self._chunk_manager.total_mem["cuda"]

    measure_cuda = ChunkMemStatsCollector.__init__

    def init(self: ChunkMemStatsCollector, chunk_manager: Any, memstats: Any = None) -> None:
        measure_cuda(self, chunk_manager, memstats)
        self._mem_monitor = ChunkMemoryMonitor(chunk_manager)

    ChunkMemStatsCollector.__init__ = init
