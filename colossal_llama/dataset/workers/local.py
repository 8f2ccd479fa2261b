"""This machine's processes."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from colossal_llama.corpus.storage import InputFile
from colossal_llama.dataset.workers.node_check import remove_token_files
from colossal_llama.utils.errors import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalWorkers:
    """Processes of this machine; one worker is this process itself.

    Args:
        num_workers: number of processes.
        functions: what `run` will be asked for, so that workers import it while this process does other
        things.
    """

    def __init__(self, num_workers: int, functions: Sequence[Callable]) -> None:
        self.num_workers = num_workers
        self.functions = tuple(functions)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalWorkers:
        # Parallelism is by process: threads inside each would only get in each other's way.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if self.num_workers > 1:
            # fork would copy the locks of the threads that libraries have started here.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (self.functions,))
            # Ctrl-C reaches workers too. They inherit that it waits, also while they are still starting.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                for _ in range(self.num_workers):
                    self._pool.submit(_do_nothing)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def check_storage(
        self, output_dirs: Sequence[Path], files: Sequence[InputFile], packages: Sequence[str] = ()
    ) -> None:
        """Other processes of this machine see what this one sees."""
        remove_token_files(output_dirs)

    def describe_nodes(self) -> str:
        return ""

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """See `Workers.run`."""
        if self._pool is None:
            for index, task in enumerate(tasks):
                yield index, function(task)
            return
        waiting = iter(enumerate(tasks))
        running: dict[Future[Result], int] = {}
        try:
            while True:
                while len(running) < 2 * self.num_workers and (item := next(waiting, None)) is not None:
                    running[self._pool.submit(function, item[1])] = item[0]
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory; use fewer --num_workers. "
                "The same command goes on where this one stopped"
            ) from None


def _start_worker(functions: Sequence[Callable]) -> None:
    """Runs first in every worker; that `functions` arrived here means that their modules are imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A worker whose parent was killed has nobody left to work for."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _do_nothing() -> None:
    """Makes the pool start a worker."""
