"""Ray prints what its workers' nodes report, though it was asked not to.

Broken in: Ray 2.60.0: `log_to_driver=False` holds for the output of workers, not for that of raylets.
Shows as: lines such as "(raylet) A worker died…" between ours, which say which node is lost.
Cure: switch its printing off where it still has that switch.
"""

from __future__ import annotations


def silence_raylets() -> None:
    """Call it before `ray.init`; imports ray."""
    import ray

    if hasattr(ray._private.worker, "_worker_logs_enabled"):
        ray._private.worker._worker_logs_enabled = False
