"""The seam's other side: the same functions over the same tasks, as tasks of a Ray cluster.

What goes through Ray is a function's name, a task (file names and lengths) and a summary. A task whose worker
or node dies is run again by Ray; that changes nothing, since tasks write files whole or not at all. Ray is
imported only when it is asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from colossal_llama.corpus.storage import InputFile
from colossal_llama.dataset.workers.node_check import NodeCheck, find_node_problems, make_node_check
from colossal_llama.upstream.raylet_messages import silence_raylets
from colossal_llama.utils.console import format_table, log, warn
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import first_line

Task = TypeVar("Task")
Result = TypeVar("Result")

# Of one task: nodes may be taken away, but a task that kills its worker must not go on for ever.
MAX_RETRIES = 4
SECONDS_TO_REACH_A_PORT = 10.0
SECONDS_TO_CONNECT = 60.0
SECONDS_TO_CHECK_NODES = 120.0
SECONDS_BETWEEN_LOOKS = 5.0  # at the size of the cluster
LOCAL_OBJECT_STORE_BYTES = 100 << 20  # next to nothing is kept there
# For the workers: parallelism is by process, and loading a tokenizer needs no torch.
ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}


class RayWorkers:
    """The CPUs of a Ray cluster.

    Args:
        address: "local" starts Ray on this machine alone, "auto" finds the cluster that this machine belongs
            to, HOST:PORT is its head.
        num_workers: tasks at a time; None is as many as the cluster has CPUs.
    """

    def __init__(self, address: str, num_workers: int | None) -> None:
        self.address = address
        self.num_workers = num_workers
        self._stack = contextlib.ExitStack()
        self._check: NodeCheck | None = None
        self._tasks_of_node: Counter[str] = Counter()
        self._seconds_of_node: Counter[str] = Counter()
        self._nodes: dict[str, dict[str, Any]] = {}  # by id, living and lost
        self._looked_at = float("-inf")

    def __enter__(self) -> RayWorkers:
        connect(self.address, self.num_workers)
        import ray

        self._stack.callback(ray.shutdown)
        self._nodes = _find_nodes()
        num_nodes = sum(map(_is_at_work, self._nodes.values()))
        log(f"Ray: {_count(num_nodes, 'node')}, {_count(self._count_cpus(), 'CPU')}")
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def check_storage(
        self, output_dirs: Sequence[Path], files: Sequence[InputFile], packages: Sequence[str] = ()
    ) -> None:
        """Every node has to see the same files and to run the same versions.

        Nodes that join later are checked by their first task.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._check = self._stack.enter_context(make_node_check(output_dirs, files, packages))
        nodes = {node_id: node for node_id, node in self._nodes.items() if _is_at_work(node)}
        answers = {
            _remote(_check_node, 0, NodeAffinitySchedulingStrategy(node_id, soft=False)).remote(
                self._check
            ): node_id
            for node_id in nodes
        }
        done, silent = ray.wait(list(answers), num_returns=len(answers), timeout=SECONDS_TO_CHECK_NODES)
        problems = []
        for reference in done:
            name = _name_of(nodes[answers[reference]])
            try:
                problems += [f"node {name} {problem}" for problem in ray.get(reference)]
            except ray.exceptions.RayTaskError as error:
                problems.append(f"node {name} can't run this code: {_last_line(error)}")
            except ray.exceptions.RayError as error:
                warn(f"node {name} can't be reached, going on without it: {first_line(error)}")
        for reference in silent:
            name = _name_of(nodes[answers[reference]])
            problems.append(f"node {name} does not answer within {SECONDS_TO_CHECK_NODES:.0f} s")
        if problems:
            raise UserError([f"--ray_address {self.address}: {problem}" for problem in sorted(problems)])

    def preload(self, function: Callable[..., object], *arguments: str | float) -> None:
        """Nothing: Ray starts its workers by itself."""

    def finish(self) -> None:
        """Nothing: they are the cluster's."""

    def run(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """See `Workers.run`."""
        import ray

        remote = _remote(_run_task, 1, "DEFAULT")
        name = (function.__module__, function.__qualname__)
        waiting = iter(enumerate(tasks))
        running: dict[Any, tuple[int, Task]] = {}
        is_stalled = False
        while True:
            self._look_at_cluster()
            limit = 2 * max(self._count_cpus(), 1)
            if self.num_workers is not None:
                limit = min(limit, self.num_workers)
            while len(running) < limit and (item := next(waiting, None)) is not None:
                running[remote.remote(*name, item[1], self._check)] = item
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=SECONDS_BETWEEN_LOOKS)
            if done:  # and all others that have come in the meantime
                done, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
            elif not self._count_cpus() and not is_stalled:
                warn("no node with a CPU is left in the cluster; waiting for one to join")
                is_stalled = True
            for reference in done:
                index, task = running.pop(reference)
                result, node_id, seconds = self._get(reference, task)
                self._tasks_of_node[node_id] += 1
                self._seconds_of_node[node_id] += seconds
                yield index, result

    def describe_nodes(self) -> str:
        """Tasks and seconds of each node, all workers of a node together."""
        self._nodes.update(_find_nodes())
        rows = [
            [
                _name_of(self._nodes[node_id]) + ("" if self._nodes[node_id]["Alive"] else ", lost"),
                num_tasks,
                round(self._seconds_of_node[node_id], 1),
            ]
            for node_id, num_tasks in self._tasks_of_node.items()
        ]
        return format_table(["node", "tasks", "seconds of work"], sorted(rows)) if rows else ""

    def _count_cpus(self) -> int:
        """CPUs of the cluster as it was when it was last looked at."""
        return sum(int(node["Resources"]["CPU"]) for node in self._nodes.values() if _is_at_work(node))

    def _look_at_cluster(self) -> None:
        """Nodes come and go; who goes is said once."""
        if time.monotonic() - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        before, self._nodes = self._nodes, {**self._nodes, **_find_nodes()}
        self._looked_at = time.monotonic()
        for node_id, node in self._nodes.items():
            known = before.get(node_id)
            if known is None and _is_at_work(node):
                log(f"Ray: node {_name_of(node)} joined")
            elif known is not None and known["Alive"] and not node["Alive"]:
                warn(f"node {_name_of(node)} is lost; others run its unfinished tasks again")

    def _get(self, reference: Any, task: Any) -> tuple[Any, str, float]:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MemoryError):
                raise UserError(f"{task}: a worker ran out of memory; use fewer --num_workers") from None
            if isinstance(error.cause, (UserError, OSError)):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise UserError(
                f"{task}: the worker died {MAX_RETRIES + 1} times, perhaps for want of memory: "
                f"{first_line(error)}; use fewer --num_workers, or `ray start` with fewer --num-cpus. "
                "The same command goes on where this one stopped"
            ) from None


def connect(address: str, num_cpus: int | None) -> None:
    """Connects this process to Ray, or starts it for "local"; quietly.

    Raises:
        UserError: nothing there within the time limit, or other versions of Ray or Python.
    """
    # The driver decides how often Ray repeats a task that its memory monitor killed; by default for ever.
    os.environ.setdefault("RAY_task_oom_retries", str(MAX_RETRIES))
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"--ray_address {address}: {error}; pip install ray") from None
    silence_raylets()
    if address == "local":
        # Not in another thread: the kernel would end what Ray starts together with that thread.
        ray.init(
            address="local",
            num_cpus=num_cpus or len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        return
    remedy = "run `ray start` on every node, this one too"
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_REACH_A_PORT).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"--ray_address {address}: can't be reached ({error}); {remedy}") from None
    outcome: list[BaseException | None] = []

    def initialise() -> None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    # Ray itself would try for minutes when what answers at a port is not Ray.
    thread = threading.Thread(target=initialise, daemon=True)
    thread.start()
    thread.join(SECONDS_TO_CONNECT)
    if not outcome:
        raise UserError(
            f"--ray_address {address}: no Ray cluster answers within {SECONDS_TO_CONNECT:.0f} s; {remedy}"
        )
    if outcome[0] is not None:
        raise UserError(f"--ray_address {address}: {' '.join(str(outcome[0]).split()).rstrip('.')}; {remedy}")


def _remote(function: Callable, num_cpus: int, scheduling_strategy: Any) -> Any:
    import ray

    return ray.remote(function).options(
        num_cpus=num_cpus, max_retries=MAX_RETRIES, scheduling_strategy=scheduling_strategy
    )


def _check_node(check: NodeCheck) -> list[str]:
    """Runs in a worker."""
    return find_node_problems(check)


def _run_task(module: str, name: str, task: Any, check: NodeCheck | None) -> tuple[Any, str, float]:
    """Runs in a worker: `(result, id of the node, seconds)`."""
    import ray

    started = time.monotonic()
    os.environ.update(ENVIRONMENT)
    try:
        if check is not None:
            _check_once(check)
        result = getattr(importlib.import_module(module), name)(task)
    except UserError as error:
        node = socket.gethostname()
        raise UserError([f"{problem} (on node {node})" for problem in error.problems]) from None
    return result, ray.get_runtime_context().get_node_id(), time.monotonic() - started


_checked: set[str] = set()


def _check_once(check: NodeCheck) -> None:
    if check.key not in _checked:
        if problems := find_node_problems(check):
            raise UserError([f"this node {problem}" for problem in problems])
        _checked.add(check.key)


def _find_nodes() -> dict[str, dict[str, Any]]:
    import ray

    return {node["NodeID"]: node for node in ray.nodes()}


def _is_at_work(node: dict[str, Any]) -> bool:
    """A head without CPUs only directs the others."""
    return bool(node["Alive"] and node["Resources"].get("CPU"))


def _name_of(node: dict[str, Any]) -> str:
    """Host and the beginning of Ray's id: a host may run several nodes."""
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})"


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")
