"""Lost processes and hosts: what counts as one, and what is said."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from colossal_llama.training.resilience.peers import (
    HostWatch,
    _Judge,
    describe_lost_peer,
    host_timeout,
    watched_peers,
)
from colossal_llama.utils.errors import UserError


@pytest.mark.parametrize(("text", "seconds"), [("", 120.0), ("7.5", 7.5)])
def test_the_timeout(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSAL_LLAMA_HOST_TIMEOUT", text)
    assert host_timeout() == seconds


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan"])
def test_a_bad_timeout(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSAL_LLAMA_HOST_TIMEOUT", text)
    with pytest.raises(UserError, match=f"COLOSSAL_LLAMA_HOST_TIMEOUT={text}: is not a number of seconds"):
        host_timeout()


LOST = [
    (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:36550: Connection reset",
        "Read error [10.0.0.2]:36550: Connection reset",
    ),
    (
        "NCCL error in: x.cpp:1, remote process exited or there was a network error\nncclRemoteError: …",
        "NCCL error in: x.cpp:1, remote process exited or there was a network error",
    ),
]


@pytest.mark.parametrize(("text", "line"), LOST)
def test_lost_connections_are_told_from_other_errors(text: str, line: str) -> None:
    assert describe_lost_peer(RuntimeError(text)) == line


@pytest.mark.parametrize("text", ["CUDA out of memory", "NCCL error: unhandled cuda error"])
def test_other_errors_keep_their_traceback(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_lost_peer(RuntimeError(text)) is None
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    with pytest.raises(RuntimeError, match=text), watched_peers():
        raise RuntimeError(text)


def test_a_lost_connection_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUP_WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError) as caught, watched_peers():
        raise RuntimeError(LOST[0][0])
    (problem,) = caught.value.problems
    assert problem.startswith("rank 3 on ")
    assert "Connection reset" in problem
    assert "--load_checkpoint latest" in problem
    assert caught.value.exit_code == 1
    assert caught.value.this_rank_only


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def judge(store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> _Judge:
    """On the first of four hosts; a host is lost after 0.3 s."""
    for name, value in {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    return _Judge(HostWatch(0.3), store)


def tell(store: dist.TCPStore, number: int, text: str) -> None:
    store.set(f"host_watch/0/host-{number}", text)


def test_hosts_that_count_on_or_have_left_are_well(store: dist.TCPStore, judge: _Judge) -> None:
    deadline, count = time.monotonic() + 0.8, 0
    while time.monotonic() < deadline:
        count += 1
        tell(store, 1, f"{count} host-b")
        tell(store, 2, f"{count} host-c")
        tell(store, 3, "left host-d")
        assert judge.verdict() is None
        time.sleep(0.05)


def test_a_silent_host_is_named_and_the_others_are_told(store: dist.TCPStore, judge: _Judge) -> None:
    tell(store, 1, "1 host-b")
    tell(store, 3, "1 host-d")
    assert judge.verdict() is None
    time.sleep(0.4)
    tell(store, 3, "2 host-d")
    verdict = judge.verdict()
    assert verdict is not None
    assert "host-b: no sign of life for 0 s" in verdict
    assert "host number 2: no sign of life" in verdict, "it has never said its name"
    assert "host-d" not in verdict
    assert store.get("host_watch/0/verdict").decode() == verdict


def test_a_failed_host_is_named_at_once(store: dist.TCPStore, judge: _Judge) -> None:
    tell(store, 2, "failed host-c")
    assert judge.verdict() == "host-c: training ended with an error there"
