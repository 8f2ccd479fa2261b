"""This machine's processes."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from colossal_llama.corpus.storage import InputFile
from colossal_llama.dataset import preloading
from colossal_llama.dataset.workers.node_check import remove_token_files
from colossal_llama.utils.errors import UserError

GC_THRESHOLD = 100_000  # objects, see `gc`
HAS_SAFE_PATH = sys.version_info >= (3, 11)

Task = TypeVar("Task")
Result = TypeVar("Result")


class LocalWorkers:
    """Processes of this machine; one worker is this process itself.

    Workers are forked from a server, a process of one thread: what it has loaded, they share. Not with Python
    3.10, where a server would look for this package in the current directory first.

    Args:
        num_workers: number of processes.
        functions: what `run` will be asked for, so that workers import it while this process does other
        things.
    """

    def __init__(self, num_workers: int, functions: Sequence[Callable]) -> None:
        self.num_workers = num_workers
        self.functions = tuple(functions)
        self._pool: ProcessPoolExecutor | None = None
        # Not the thread's `join`: one that Ctrl-C interrupts takes the thread for ended.
        self._started = threading.Event()

    def __enter__(self) -> LocalWorkers:
        # Parallelism is by process: threads inside each would only get in each other's way.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._pool is None:
            return
        server = multiprocessing.forkserver._forkserver
        if exception[0] is not None and not self._started.is_set() and server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)  # nobody waits for what it loads any more
        self._started.wait()
        self._pool.shutdown(wait=True, cancel_futures=True)
        # The next ones are forked from a server of their own, with other things loaded.
        server._stop()

    def preload(self, function: Callable[..., object], *arguments: str | float) -> None:
        """See `Workers.preload`."""
        self._start(
            {preloading.VARIABLE: json.dumps([function.__module__, function.__qualname__, *arguments])}
        )

    def _start(self, environment: dict[str, str]) -> None:
        """Starts the server with this in its environment, and a thread that has the workers forked."""
        if self.num_workers == 1 or self._pool is not None:
            return
        # Not forked from this process: that would copy the locks of the threads that libraries started here.
        context = multiprocessing.get_context("forkserver" if HAS_SAFE_PATH else "spawn")
        context.set_forkserver_preload([preloading.__name__])
        pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (self.functions,))
        # Until it forks, the server finds modules by its environment alone.
        environment = {**environment, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
        # Ctrl-C reaches all of them. They inherit that it waits, also while they are still starting.
        with _no_interrupts(), _environment(environment if HAS_SAFE_PATH else {}):
            if HAS_SAFE_PATH:
                multiprocessing.forkserver.ensure_running()
            threading.Thread(target=self._start_workers, args=(pool,), daemon=True).start()
            self._pool = pool

    def _start_workers(self, pool: ProcessPoolExecutor) -> None:
        """Waits until the server is ready; `run` meets what goes wrong here once more."""
        try:
            with contextlib.suppress(Exception):
                for _ in range(self.num_workers):
                    pool.submit(_do_nothing)
        finally:
            self._started.set()

    def check_storage(
        self, output_dirs: Sequence[Path], files: Sequence[InputFile], packages: Sequence[str] = ()
    ) -> None:
        """Other processes of this machine see what this one sees."""
        remove_token_files(output_dirs)

    def finish(self) -> None:
        """See `Workers.finish`."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def describe_nodes(self) -> str:
        return ""

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """See `Workers.run`."""
        self._start({})
        if self._pool is None:
            for index, task in enumerate(tasks):
                yield index, function(task)
            return
        self._started.wait()
        waiting = iter(enumerate(tasks))
        running: dict[Future[Result], int] = {}
        try:
            while True:
                while len(running) < 2 * self.num_workers and (item := next(waiting, None)) is not None:
                    with _no_interrupts():  # a pool with a worker half-started does not end
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


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """For what is started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker(functions: Sequence[Callable]) -> None:
    """Runs first in every worker; that `functions` arrived here means that their modules are imported."""
    # Records are many small objects without cycles: a tenth of the time went into looking for some.
    gc.set_threshold(GC_THRESHOLD)
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
