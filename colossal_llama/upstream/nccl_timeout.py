"""Collectives on GPUs give up after ten minutes; writing or checking a checkpoint can take longer.

Broken in: torch 2.5.1: groups of NCCL wait 10 minutes where gloo's wait 30; colossalai 0.5.0 makes all its
groups without a time of its own.
Shows as: "Watchdog caught collective operation timeout" on every rank, while one of them still writes.
Cure: a longer default for groups of NCCL. Lost processes and hosts are noticed in other ways (`resilience/`).
"""

from __future__ import annotations

from datetime import timedelta

WAIT = timedelta(hours=2)


def wait_for_slow_processes() -> None:
    """Call it before process groups are made."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_nccl_timeout = WAIT
