"""What the pre-flight check makes of answers that no test machine has: GPUs, firewalls, odd names."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from colossal_llama.launch.diagnosis import find_problems, find_warnings, format_answers
from colossal_llama.launch.preflight import directories_of
from colossal_llama.launch.settings import HostSettings
from colossal_llama.launch.ssh_probe import Answer, Directories

GPU = {"name": "NVIDIA H100 80GB HBM3", "total": 81559, "used": 4}
FACTS = {
    "hostname": "a",
    "python": "3.11.2",
    "executable": "/venv/bin/python",
    "torchrun": "/venv/bin/torchrun",
    "pkill": "/usr/bin/pkill",
    "packages": {"torch": "2.5.1", "colossalai": "0.5.0", "transformers": "4.51.3", "datasets": "5.0.0"},
    "gpus": [GPU, GPU],
    "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1", "ib0": "10.1.0.1"},
    "own_address": "10.0.0.1",
    "project": {"version": "0.1.0", "sources": "0123456789ab"},
    "paths": {},
    "port": None,
    "first_address": "10.0.0.1",
    "source_address": "10.0.0.1",
}


def answers(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> list[Answer]:
    """Hosts a and b, good but for the facts given."""
    both = [{**copy.deepcopy(FACTS), **(changes or {})} for changes in (first, second)]
    return [Answer("a", both[0]), Answer("b", {"connection": None, **both[1]})]


def problems_of(found: list[Answer], nproc_per_node: int | None = None) -> list[str]:
    return find_problems(found, HostSettings(nproc_per_node=nproc_per_node), Directories())


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def test_good_hosts_have_no_problems() -> None:
    assert problems_of(answers(), nproc_per_node=2) == []
    assert list(find_warnings(answers())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"python": "3.10.1"}, "Python 3.10.1 (/venv/bin/python), a has 3.11.2"),
        ({"packages": {**FACTS["packages"], "torch": "2.4.0"}}, "torch 2.4.0, a has 2.5.1; install the same"),
        ({"packages": {**FACTS["packages"], "colossalai": None}}, "colossalai is not installed"),
        ({"torchrun": None}, "no torchrun on PATH"),
        ({"project": None}, "no train.py there"),
        ({"gpus": "Driver/library version mismatch"}, "can't be used: Driver/library version mismatch"),
        ({"gpus": []}, "0 GPUs for --nproc_per_node 2; start fewer processes"),
        ({"first_address": None}, "does not know the name a; add it to DNS"),
        ({"first_address": "127.0.1.1"}, "takes a for itself (127.0.1.1); correct /etc/hosts"),
        ({"connection": "no answer within 10 s"}, "can't reach a (10.0.0.1) at port 29500: no answer within"),
    ],
)
def test_a_problem_of_the_second_host(changes: dict, message: str) -> None:
    (problem,) = [text for text in problems_of(answers(None, changes), nproc_per_node=2) if message in text]
    assert problem.startswith("b: ")


def test_a_project_that_is_elsewhere_is_one_problem() -> None:
    facts = {key: FACTS[key] for key in ("hostname", "python", "executable", "torchrun", "packages", "gpus")}
    found = [
        Answer("a", copy.deepcopy(FACTS)),
        Answer("b", {**facts, "workdir": "No such file or directory"}),
    ]
    (problem,) = problems_of(found)
    assert problem.startswith("b: ")
    assert "No such file or directory; every host needs the project at this path" in problem
    assert "missing" in format_answers(found, Directories())


def test_on_a_cpu_a_host_must_be_reachable_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = {"gpus": [], "own_address": "127.0.1.1"}
    assert problems_of(answers({"gpus": []}, {"gpus": []})) == []
    (problem,) = problems_of(answers({"gpus": []}, loopback))
    assert problem.startswith("b: its name a resolves to 127.0.1.1, where other hosts can't reach it")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert problems_of(answers({"gpus": []}, loopback)) == []


@pytest.mark.parametrize(
    ("setting", "is_good"),
    [
        ("eth0", True),
        ("eth", True),
        ("ib,eth", True),
        ("=eth0", True),
        ("=eth", False),
        ("^lo,docker", True),
        ("^lo,eth,ib", False),
        ("^=lo", True),
        ("ens", False),
    ],
)
def test_nccls_rules_for_interfaces(setting: str, is_good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", setting)
    assert (problems_of(answers()) == []) == is_good


def test_gpus_that_are_chosen_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = problems_of(answers(), nproc_per_node=2)
    assert [problem.split(";")[0] for problem in found] == [
        "a: 1 GPUs for --nproc_per_node 2",
        "b: 1 GPUs for --nproc_per_node 2",
    ]


def test_a_host_without_pkill_deserves_a_look() -> None:
    (doubt,) = find_warnings(answers(None, {"pkill": None}))
    assert doubt.startswith("b: no pkill there")


def test_warnings_and_the_table() -> None:
    busy = {**GPU, "used": 40960}
    found = answers(None, {"gpus": [GPU, busy, {**GPU, "name": "NVIDIA A100"}]})
    assert list(find_warnings(found)) == [
        "b: GPU 1 has 40.0 of 79.6 GiB in use",
        "different GPUs (NVIDIA A100, NVIDIA H100 80GB HBM3): each step waits for the slowest",
    ]
    table = format_answers([*found, Answer("c", problem="c: ssh failed")], Directories())
    rows = table.splitlines()[2:]
    assert rows[0].endswith("  2 x NVIDIA H100 80GB HBM3, 80 GiB")
    assert rows[1].endswith("2 x NVIDIA H100 80GB HBM3 + 1 x NVIDIA A100, 40 GiB")
    assert rows[2].split() == ["c", "failed", *"--------"]


def test_directories_of_a_training_command(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = "train.py --pretrained model --dataset a b --plugin zero2 --load_checkpoint latest --save_dir out"
    found = directories_of(words.split())
    assert found.inputs == [("--pretrained", "model"), ("--dataset", "a"), ("--dataset", "b")]
    assert found.save_dir == "out"
    hub = directories_of(
        ["train.py", "--pretrained", "meta-llama/Llama-2-7b", "--load_checkpoint", "old/step"]
    )
    assert hub.inputs == [("--load_checkpoint", "old/step")]
    assert hub.save_dir == "checkpoint_dir"
    assert directories_of([]) == Directories()
