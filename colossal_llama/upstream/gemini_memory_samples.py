"""The placement "auto" plans with the memory of other operations once a model was evaluated, and prints.

Broken in: colossalai 0.5.0, `MemStatsCollector`: which operation's memory comes next is counted on from pass
to pass, and an evaluation, which has no backward half, leaves the count in the middle. It also prints for
debugging, and asks a deprecated module how large the device is.
Shows as: chunks that are moved too early or too late after the first evaluation, up to "Adjust layout failed!
No enough CUDA memory!"; a line `finish_collection N` of each process on stdout, and a warning of torch's in
front of which no filter can be.
Cure: count from the start in every pass; print nothing, and import that module beforehand.
"""

from __future__ import annotations

import warnings

from colossal_llama.upstream.lean_imports import lean_imports


def count_memory_samples_anew() -> None:
    """Replaces what ends a pass; may be called often."""
    with lean_imports(), warnings.catch_warnings(record=True):
        import colossalai.legacy.utils.memory  # noqa: F401
    from colossalai.zero.gemini.gemini_mgr import GeminiManager
    from colossalai.zero.gemini.memory_tracer import memstats_collector

    if getattr(GeminiManager, "_counts_samples_anew", False):
        return
    original_reset = GeminiManager.reset_attributes

    def reset_attributes(self: GeminiManager) -> None:
        original_reset(self)
        if self._mem_stats_collector is not None:
            self._mem_stats_collector._step_idx = 0

    GeminiManager.reset_attributes = reset_attributes
    GeminiManager._counts_samples_anew = True
    memstats_collector.print = lambda *args: None
