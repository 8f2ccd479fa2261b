"""Reads and collates micro-batches, in processes of its own where asked to."""

from __future__ import annotations

from typing import Any

import torch

from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.rows import RowDataset


class _RowNumbers:
    """A data set whose items are their own numbers: the collator reads the rows."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitems__(self, rows: list[int | None]) -> list[int | None]:
        return rows


def make_loader(
    source: RowDataset, sampler: Any, collator: Collator, num_workers: int, pin_memory: bool
) -> Any:
    """A torch DataLoader over micro-batches; signals are left to the main process."""
    return torch.utils.data.DataLoader(
        _RowNumbers(len(source)),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals_to_parent,
        # Its own generator: drawing the workers' seed from the global one would shift dropout after a resume.
        generator=torch.Generator(),
        prefetch_factor=4 if num_workers else None,
    )


def _leave_signals_to_parent(worker: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
