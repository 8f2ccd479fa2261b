"""The other processes and hosts of a run: noticing that they are gone, and saying so in one line.

A process that dies closes its connections, and gloo's collectives fail at once. NCCL's wait, and so does
everything when a host loses power or its network. So the first process of every host keeps a counter going in
the launcher's store on the first host, and the first host looks at all of them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TIMEOUT_VARIABLE = "COLOSSAL_LLAMA_HOST_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 120.0
LOST_PEER_EXIT_CODE = 1
# Counters move this often, or six times within the timeout.
MAX_INTERVAL_SECONDS = 5.0
REMEDY = (
    "start the same command again: --load_checkpoint latest goes on from the last complete checkpoint "
    "of --save_dir"
)
# What collectives say when the process at the other end is gone.
_GLOO_TRANSPORT = "gloo/transport"
_NCCL_LOST_PEER = ("remote process exited", "Connection closed by remote peer", "Connection reset by peer")
_FAILED, _LEFT = "failed", "left"


def host_timeout() -> float:
    """Seconds without a sign of life after which a host counts as lost.

    Raises:
        UserError: the environment variable is not a number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT_SECONDS)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{TIMEOUT_VARIABLE}={text}: is not a number of seconds above 0; correct or unset it")
    return seconds


@contextlib.contextmanager
def watched_peers() -> Iterator[None]:
    """Around training: ends this process when another host is lost; lost connections become a `UserError`.

    Processes on one host need no watch: their launcher sees each of them.
    """
    watch = None
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        watch = HostWatch(host_timeout())
        if os.environ["LOCAL_RANK"] == "0":
            watch.start()
    state = _FAILED
    try:
        yield
        state = _LEFT
    except RuntimeError as error:
        line = describe_lost_peer(error)
        if line is None:
            raise
        raise UserError(
            f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}: lost the connection to another "
            f"process ({line}); it was killed, failed, or is out of reach, and its own messages say why; "
            f"{REMEDY}",
            this_rank_only=True,
            exit_code=LOST_PEER_EXIT_CODE,
        ) from error
    finally:
        if watch is not None:
            watch.finish(state)


def describe_lost_peer(error: RuntimeError) -> str | None:
    """The backend's own words when `error` means that a peer is gone; None for every other error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if _GLOO_TRANSPORT in line or any(words in line for words in _NCCL_LOST_PEER):
            return line.rpartition("] ")[2] if line.startswith("[") and "] " in line else line
    return None


class HostWatch:
    """Signs of life between hosts, through the store that every worker has joined already.

    Each host sets `host-<number>` to "<count> <name>", or to "failed <name>" or "left <name>" at its end.
    The first host judges; the others read its verdict. The first host itself is lost when its store does not
    answer.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(MAX_INTERVAL_SECONDS, timeout / 6)
        self.number = int(os.environ["GROUP_RANK"])
        self.num_hosts = int(os.environ["GROUP_WORLD_SIZE"])
        self.first_host = os.environ["MASTER_ADDR"]
        self.name = socket.gethostname()
        self._prefix = f"host_watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._finished = threading.Event()
        self._answered = time.monotonic()

    def start(self) -> None:
        threading.Thread(target=self._exchange, daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()

    def finish(self, state: str) -> None:
        """Tells the others that this process left, or failed; within a second, or not at all."""
        self._finished.set()
        if state == _LEFT and os.environ["LOCAL_RANK"] != "0":
            return
        teller = threading.Thread(target=self._tell, args=(state,), daemon=True)
        teller.start()
        teller.join(timeout=1.0)

    def _tell(self, state: str) -> None:
        with contextlib.suppress(Exception):  # the store may be gone, which is a message as well
            self._connect().set(self._key(self.number), f"{state} {self.name}")

    def _key(self, number: int) -> str:
        return f"{self._prefix}/host-{number}"

    def _connect(self) -> TCPStore:
        """A connection of its own: training's may be blocked in a call."""
        from torch.distributed import TCPStore

        port = int(os.environ["MASTER_PORT"])
        return TCPStore(self.first_host, port, is_master=False, timeout=timedelta(seconds=self.timeout))

    def _exchange(self) -> None:
        """Sets this host's counter and reads what concerns it, until training ends."""
        try:
            store = self._connect()
            judge = _Judge(self, store) if self.number == 0 else None
            count = 0
            while not self._finished.wait(self.interval if count else 0):
                count += 1
                store.set(self._key(self.number), f"{count} {self.name}")
                verdict = self._read_verdict(store) if judge is None else judge.verdict()
                self._answered = time.monotonic()
                if verdict is not None:
                    self._end(verdict, delay=0 if judge is None else 2 * self.interval)
        except Exception as error:
            # The first host's launcher is gone. Give training a moment to end by itself.
            if not self._finished.wait(self.interval):
                self._end(f"{self.first_host}: the first host has stopped ({str(error).splitlines()[0]})")

    def _read_verdict(self, store: TCPStore) -> str | None:
        key = f"{self._prefix}/verdict"
        return store.get(key).decode() if store.check([key]) else None

    def _watch_store(self) -> None:
        while not self._finished.wait(1.0):
            silence = time.monotonic() - self._answered
            if silence > self.timeout + 2 * self.interval:
                self._end(
                    f"{self.first_host}: no answer for {silence:.0f} s from the first host; it or the "
                    "network has failed"
                )

    def _end(self, verdict: str, delay: float = 0.0) -> None:
        if self._finished.wait(delay):
            return
        print(f"error: {self.name} stops: {verdict}; {REMEDY}", file=sys.stderr, flush=True)
        os._exit(LOST_PEER_EXIT_CODE)


class _Judge:
    """On the first host: which of the others has been silent for too long, or has failed."""

    def __init__(self, watch: HostWatch, store: TCPStore) -> None:
        self._watch, self._store = watch, store
        now = time.monotonic()
        self._last = dict.fromkeys(range(1, watch.num_hosts), ("", now))

    def verdict(self) -> str | None:
        """Looks at every host once; a verdict is published before it is returned."""
        found = [message for message in map(self._look_at, list(self._last)) if message is not None]
        if not found:
            return None
        verdict = "; ".join(found)
        self._store.set(f"{self._watch._prefix}/verdict", verdict)
        return verdict

    def _look_at(self, number: int) -> str | None:
        key, now = self._watch._key(number), time.monotonic()
        text = self._store.get(key).decode() if self._store.check([key]) else ""
        state, _, name = text.partition(" ")
        if state == _LEFT:
            return None
        if state == _FAILED:
            return f"{name}: training ended with an error there"
        old, since = self._last[number]
        if text != old:
            self._last[number] = (text, now)
            return None
        if now - since <= self._watch.timeout:
            return None
        return (
            f"{name or f'host number {number}'}: no sign of life for {now - since:.0f} s; it or the network "
            "has failed"
        )
