"""The prepare scripts on a Ray cluster of two nodes: the bytes of a local run, whatever dies on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus import sample_texts
from support import ROOT

from colossal_llama.corpus.storage import stat_file
from colossal_llama.dataset.shards import read_table
from colossal_llama.dataset.workers.ray_cluster import RayWorkers
from colossal_llama.utils.errors import UserError

PRETRAIN = "prepare_pretrain_dataset.py"
SFT = "prepare_sft_dataset.py"
NUM_CHECKS = 2  # tasks before the shards: special tokens, a sample of the input with an engine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and a second node with one CPU each."""
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need short names
    Path("/tmp/ray").mkdir(exist_ok=True)  # where Ray notes its address, whatever its temp_dir is
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_health_check_period_ms", "500")  # a lost node is soon known to be lost
        patch.setenv("PYTHONPATH", str(ROOT))
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False, "temp_dir": temp_dir}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.second_node = cluster.add_node(num_cpus=1)
            yield cluster
        finally:
            cluster.shutdown()
            shutil.rmtree(temp_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def pretrain_flags(tmp_path_factory: pytest.TempPathFactory, llama2_tokenizer_dir: Path) -> dict[str, Any]:
    """One file of 16 MB, so some eight shards."""
    directory = tmp_path_factory.mktemp("pretrain")
    texts = sample_texts(1000, seed=4)
    generator = random.Random(0)
    with open(directory / "a.jsonl", "w", encoding="utf-8") as file:
        for _ in range(20_000):
            target = " ".join(generator.choices(texts, k=4))
            record = {"source": "", "target": target, "category": generator.choice("xyz")}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return {
        "data_input_dirs": directory,
        "tokenizer_dir": llama2_tokenizer_dir,
        "num_spliced_dataset_bins": 7,
        "max_length": 512,
    }


@pytest.fixture(scope="module")
def local_output(
    tmp_path_factory: pytest.TempPathFactory, pretrain_flags: dict[str, Any]
) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("local") / "out"
    finish(start(PRETRAIN, **pretrain_flags, data_output_dirs=directory))
    return read_bytes(directory)


def start(script: str, cwd: Path = ROOT, **flags: object) -> subprocess.Popen[str]:
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Waits for a command; returns what it printed, errors where it failed as it should."""
    try:
        out, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    return errors if code else out


def read_bytes(directory: Path) -> dict[str, bytes]:
    """Everything that a run leaves but the cache."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != "cache" and path.name != ".lock"
    }


def wait_until(happened: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished_shards(out: Path) -> dict[str, int]:
    """Names and inodes of the shards in the cache."""
    return {path.name: path.stat().st_ino for path in (out / "cache" / "shards").glob("*.npz")}


def tasks_by_node(output: str) -> dict[str, int]:
    """The summary's table."""
    return {
        name: int(count)
        for name, count in re.findall(
            r"^(\S+ \(\w{6}\)(?:, lost)?) +(\d+) +[\d.]+$", output, flags=re.MULTILINE
        )
    }


def workers_at_work() -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_run_task"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def send(signal_number: int, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


def test_the_same_bytes_as_a_local_run(
    cluster: Any, pretrain_flags: dict[str, Any], local_output: dict[str, bytes], tmp_path: Path
) -> None:
    # A relative path: workers have a working directory of their own.
    process = start(PRETRAIN, tmp_path, **pretrain_flags, data_output_dirs="out", ray_address=cluster.address)
    output = finish(process)
    assert read_bytes(tmp_path / "out") == local_output
    assert "Ray: 2 nodes, 2 CPUs" in output
    tasks = tasks_by_node(output)
    assert len(tasks) == 2, output
    assert sum(tasks.values()) == len(finished_shards(tmp_path / "out")) + 7 + NUM_CHECKS
    assert "(raylet)" not in output
    assert not list((tmp_path / "out").rglob(".visible-*"))


def test_conversations(cluster: Any, tmp_path: Path, llama2_tokenizer_dir: Path) -> None:
    flags = {
        "data_input_dirs": ROOT / "examples/data/sft",
        "tokenizer_dir": llama2_tokenizer_dir,
        "llama_version": 2,
        "num_spliced_dataset_bins": 3,
        "held_out_share": 0.2,
    }
    finish(start(SFT, **flags, data_output_dirs=tmp_path / "local", num_workers=1))
    finish(start(SFT, **flags, data_output_dirs=tmp_path / "ray", ray_address=cluster.address))
    assert read_bytes(tmp_path / "ray") == read_bytes(tmp_path / "local")
    assert (tmp_path / "ray" / "held_out" / "part-00000.jsonl").stat().st_size


def test_a_worker_and_a_node_that_die_change_nothing(
    cluster: Any, pretrain_flags: dict[str, Any], local_output: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(PRETRAIN, **pretrain_flags, data_output_dirs=out, ray_address=cluster.address)
    wait_until(lambda: finished_shards(out) and workers_at_work(), process)
    killed, *others = workers_at_work()
    os.kill(killed, signal.SIGKILL)
    send(signal.SIGSTOP, others)  # or they would finish everything before the killed one is replaced
    wait_until(lambda: len(set(workers_at_work()) - {killed}) == 2, process)
    send(signal.SIGSTOP, workers_at_work())
    cluster.remove_node(cluster.second_node, allow_graceful=False)
    assert not (out / "stats.json").exists()
    assert len(finished_shards(out)) < 8, "too late for a test"
    send(signal.SIGCONT, workers_at_work())
    try:
        output = finish(process)
    finally:
        cluster.second_node = cluster.add_node(num_cpus=1)
    assert read_bytes(out) == local_output
    assert sum(tasks_by_node(output).values()) == len(finished_shards(out)) + 7 + NUM_CHECKS
    assert "(raylet)" not in output
    assert not list(out.rglob("*.tmp"))


def test_a_killed_driver_goes_on_with_what_is_finished(
    cluster: Any, pretrain_flags: dict[str, Any], local_output: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = {**pretrain_flags, "data_output_dirs": out, "ray_address": cluster.address}
    first = start(PRETRAIN, **flags)
    wait_until(lambda: len(finished_shards(out)) >= 2, first)
    first.kill()
    first.communicate()
    before = finished_shards(out)
    output = finish(start(PRETRAIN, **flags))
    found = re.search(r"^(\d+) of (\d+) shards are in the cache", output, flags=re.MULTILINE)
    assert found
    assert 2 <= int(found[1]) < int(found[2])
    assert before.items() <= finished_shards(out).items(), "a finished shard was written again"
    assert read_bytes(out) == local_output


def test_what_goes_wrong_in_a_worker(cluster: Any, tmp_path: Path) -> None:
    with RayWorkers(cluster.address, None) as workers:
        assert sorted(workers.run(len, ["a", "bb"] * 10)) == [(i, 1 + i % 2) for i in range(20)]
        with pytest.raises(UserError, match=r"^1: the worker died 5 times.*fewer --num_workers"):
            list(workers.run(os._exit, [1]))
        with pytest.raises(Exception, match="'str' object has no attribute 'table_path'"):
            list(workers.run(read_table, ["not a task"]))  # a fault of our own keeps its traceback
        with pytest.raises(UserError, match=r"nowhere: no such file .*\(on node \S+\)"):
            list(workers.run(stat_file, [str(tmp_path / "nowhere")]))


def test_tasks_are_taken_no_faster_than_they_are_done(cluster: Any) -> None:
    taken = []

    def tasks() -> Iterator[float]:
        for _ in range(20):
            taken.append(len(taken))
            yield 0.05

    with RayWorkers(cluster.address, None) as workers:
        for count, _ in enumerate(workers.run(time.sleep, tasks()), start=1):
            assert len(taken) <= count + 4
    taken.clear()
    with RayWorkers(cluster.address, 1) as workers:
        for count, _ in enumerate(workers.run(time.sleep, tasks()), start=1):
            assert len(taken) <= count + 1


def test_a_node_without_the_storage_is_named(
    cluster: Any, pretrain_flags: dict[str, Any], tmp_path: Path
) -> None:
    """A third node in a mount namespace of its own, where another file system lies over the output."""
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here, which takes root")
    out = tmp_path / "out"
    out.mkdir()
    node = subprocess.Popen(
        [
            *("unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$1" && exec "${@:2}"', "-", str(out)),
            *(
                sys.executable,
                "-m",
                "ray.scripts.scripts",
                "start",
                f"--address={cluster.address}",
                "--block",
            ),
            *("--num-cpus=1", "--object-store-memory=100000000"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        with RayWorkers(cluster.address, None):
            import ray

            known = {n.node_id for n in cluster.list_all_nodes()}
            while not (new := {n["NodeID"] for n in ray.nodes() if n["Alive"]} - known):
                assert node.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
        process = start(PRETRAIN, **pretrain_flags, data_output_dirs=out, ray_address=cluster.address)
        errors = finish(process, code=2)
        (name,) = {node_id[:6] for node_id in new}
        assert re.search(rf"node \S+ \({name}\) does not see {out}\S*; it has to be on storage", errors), (
            errors
        )
        assert len(re.findall(r"^error: .* node ", errors, flags=re.MULTILINE)) == 3, errors
    finally:
        node.terminate()
        node.wait()


def test_addresses_where_there_is_no_ray(pretrain_flags: dict[str, Any], tmp_path: Path) -> None:
    flags = {**pretrain_flags, "data_output_dirs": tmp_path / "out"}
    errors = finish(start(PRETRAIN, **flags, ray_address="127.0.0.1:1"), code=2)
    assert "--ray_address 127.0.0.1:1: can't be reached" in errors
    assert "ray start" in errors


def test_the_slurm_example(
    pretrain_flags: dict[str, Any], local_output: dict[str, bytes], tmp_path: Path
) -> None:
    """The example with its variables filled in, and an `srun` that starts both tasks on this machine."""
    text = (ROOT / "examples/launch/prepare_ray.slurm.sh").read_text(encoding="utf-8")
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    settings = {
        "DATA_INPUT_DIRS": pretrain_flags["data_input_dirs"],
        "TOKENIZER_DIR": pretrain_flags["tokenizer_dir"],
        "DATA_OUTPUT_DIRS": tmp_path / "out",
        "MAX_LENGTH": pretrain_flags["max_length"],
        "NUM_BINS": pretrain_flags["num_spliced_dataset_bins"],
        "RAY_PORT": port,
    }
    for name, value in settings.items():
        text, count = re.subn(rf'^{name}=(""|\d+)', f'{name}="{value}"', text, flags=re.MULTILINE)
        assert count == 1
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "prepare_pretrain_dataset.py").symlink_to(ROOT / "prepare_pretrain_dataset.py")
    (clone / "job").write_text(text, encoding="utf-8")
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "srun").write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        "trap 'kill $(jobs -p); wait' EXIT TERM\n"
        'for ((i = 0; i < 2; i++)); do SLURM_PROCID=$i RAY_TMPDIR="$RAY_TMPDIR/$i" "$@" & done\n'
        "wait\n"
    )
    (bin_dir / "srun").chmod(0o755)
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_TMPDIR": temp_dir,
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    process = subprocess.Popen(
        ["bash", str(clone / "job")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=clone,
        env=environment,
    )
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors + (clone / "ray-1.log").read_text()
    assert read_bytes(tmp_path / "out") == local_output
    assert "CPU" in out
    shutil.rmtree(temp_dir, ignore_errors=True)
