"""The seam between what is done and where: "run this function over these tasks".

Functions are importable by name, tasks and results are small and picklable (file names, lengths, counts): the
corpus itself only moves through files. This machine's processes are in `local`, those of a Ray cluster in
`ray_cluster`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from colossal_llama.corpus.storage import InputFile
from colossal_llama.dataset.workers.local import LocalWorkers

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers(Protocol):
    """Where tasks run; a context manager."""

    def __enter__(self) -> Workers: ...

    def __exit__(self, *exception: Any) -> None: ...

    def check_storage(
        self, output_dirs: Sequence[Path], files: Sequence[InputFile], packages: Sequence[str] = ()
    ) -> None:
        """Makes sure that every worker sees these and has these packages too; raises `UserError`."""

    def preload(self, function: Callable[..., object], *arguments: str | float) -> None:
        """Has this called where workers can share what it loads, while this process goes on; at most once.

        It must start no threads, and its errors are ignored: tasks load what is not there.
        """

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """Yields `(index of the task, function(task))` as they finish, in any order.

        At most two tasks a worker are under way: results that nobody has taken do not pile up, and a task may
        depend on results that have been taken.
        """

    def finish(self) -> None:
        """Lets the workers end while this process goes on; nothing can be run any more."""

    def describe_nodes(self) -> str:
        """A table of what each machine did; empty where there is only this one."""


def open_workers(ray_address: str, num_workers: int | None, functions: Sequence[Callable]) -> Workers:
    """Where the tasks run: `none` is this machine's processes, anything else a Ray cluster.

    Args:
        num_workers: tasks at a time; None is as many as there are cores.
    """
    if ray_address != "none":
        from colossal_llama.dataset.workers.ray_cluster import RayWorkers

        return RayWorkers(ray_address, num_workers)
    return LocalWorkers(num_workers or len(os.sched_getaffinity(0)), functions)
