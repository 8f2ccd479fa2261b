"""The two prepare scripts as a user runs them: exit codes, messages, kills, and two at once."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from corpus import sample_texts

PRETRAIN = "prepare_pretrain_dataset.py"
SFT = "prepare_sft_dataset.py"


@pytest.fixture(scope="module")
def pretrain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 10 MB: enough for several shards, little enough for a second's work."""
    directory = tmp_path_factory.mktemp("pretrain")
    texts = sample_texts(1000, seed=4)
    generator = random.Random(0)
    for name in ("a.jsonl", "b.jsonl"):
        with open(directory / name, "w", encoding="utf-8") as file:
            for _ in range(6000):
                target = " ".join(generator.choices(texts, k=4))
                record = {"source": "", "target": target, "category": generator.choice("xyz")}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return directory


@pytest.fixture(scope="module")
def sft_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sft")
    texts = sample_texts(200, seed=6, max_sentences=2)
    with open(directory / "x.jsonl", "w", encoding="utf-8") as file:
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            messages = [{"from": "human", "content": question}, {"from": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return directory


def command(root: Path, script: str, **flags: object) -> list[str]:
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, str(root / script), *arguments]


def run(root: Path, script: str, **flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(root, script, **flags), capture_output=True, text=True, cwd=root)


def read_bytes(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != "cache" and path.name != ".lock"
    }


@pytest.mark.parametrize("script", [PRETRAIN, SFT])
def test_help_is_quick(root: Path, script: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, str(root / script), "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0
    assert "--num_spliced_dataset_bins" in result.stdout
    # CPU time: the promise is for a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(("version", "flags"), [(2, {}), (3, {"splice": True})])
def test_conversations(
    root: Path,
    sft_dir: Path,
    tmp_path: Path,
    llama2_tokenizer_dir: Path,
    llama3_tokenizer_dir: Path,
    version: int,
    flags: dict,
) -> None:
    result = run(
        root,
        SFT,
        data_input_dirs=sft_dir,
        tokenizer_dir=llama2_tokenizer_dir if version == 2 else llama3_tokenizer_dir,
        data_output_dirs=tmp_path / "out",
        data_arrow_output_dir=tmp_path / "elsewhere",
        num_spliced_dataset_bins=3,
        max_length=1024,
        llama_version=version,
        **flags,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "arrow").exists()
    parts = [datasets.load_from_disk(str(path)) for path in sorted((tmp_path / "elsewhere").glob("part-*"))]
    assert len(parts) == 3
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert (stats["template"], stats["llama_version"]) == ("colossal", version)
    assert stats["records"] == {"read": 100, "kept": 100, "dropped": {}}
    assert (sum(map(len, parts)) == 100) == (not flags)
    assert "unknown" in result.stdout


def test_wrong_version_and_bad_flags(
    root: Path, sft_dir: Path, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    good = {
        "data_input_dirs": sft_dir,
        "tokenizer_dir": llama2_tokenizer_dir,
        "data_output_dirs": tmp_path / "out",
    }
    result = run(root, SFT, **good)
    assert result.returncode == 2
    assert "--llama_version 3" in result.stderr
    assert "use --llama_version 2" in result.stderr
    bad = {**good, "num_spliced_dataset_bins": 100000, "data_input_dirs": "/nowhere", "ray_address": "x"}
    bad["max_length"] = 10**11
    result = run(root, SFT, **bad)
    assert result.returncode == 2
    expected = ("--num_spliced_dataset_bins 100000", "/nowhere", "--ray_address x", "--max_length 10000")
    for word in expected:
        assert word in result.stderr
    result = run(root, SFT, **{**good, "data_output_dirs": sft_dir})
    assert result.returncode == 2
    assert "input directory" in result.stderr
    (tmp_path / "file").touch()
    no_directories = {"data_output_dirs": tmp_path / "file", "data_arrow_output_dir": tmp_path / "file" / "a"}
    result = run(root, SFT, **{**good, **no_directories})
    assert result.returncode == 2
    for flag, place in no_directories.items():
        assert f"--{flag} {place}: " in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_records_exit_with_2_and_leave_nothing(
    root: Path, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text(
        '{"source": "", "target": "a", "category": "c"}\n{"source": 1}\n'
    )
    flags = {
        "data_input_dirs": tmp_path / "in",
        "tokenizer_dir": llama2_tokenizer_dir,
        "data_output_dirs": tmp_path / "out",
        "num_spliced_dataset_bins": 1,
    }
    result = run(root, PRETRAIN, **flags)
    assert result.returncode == 2
    assert "x.jsonl:2: 'source' is a number, not a string" in result.stderr
    assert "Traceback" not in result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"cache", "arrow", ".lock"}
    result = run(root, PRETRAIN, **flags, on_bad_record="skip")
    assert result.returncode == 0, result.stderr
    assert "Skipped 1 bad records" in result.stdout


def test_killed_at_random_moments_and_started_again(
    root: Path, pretrain_dir: Path, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    flags = {
        "data_input_dirs": pretrain_dir,
        "tokenizer_dir": llama2_tokenizer_dir,
        "num_spliced_dataset_bins": 40,
        "max_length": 512,
    }
    started = time.monotonic()
    whole = run(root, PRETRAIN, **flags, data_output_dirs=tmp_path / "whole", num_workers=1)
    duration = time.monotonic() - started
    assert whole.returncode == 0, whole.stderr

    generator = random.Random(time.time_ns())
    out = tmp_path / "out"
    killed = 0
    while killed < 4:
        process = subprocess.Popen(
            command(root, PRETRAIN, **flags, data_output_dirs=out, num_workers=2),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            process.wait(timeout=generator.uniform(0.1, 1) * duration)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        if (out / "stats.json").exists():
            assert read_bytes(out) == read_bytes(tmp_path / "whole")
            shutil.rmtree(out)
    last = run(root, PRETRAIN, **flags, data_output_dirs=out)
    assert last.returncode == 0, last.stderr
    assert read_bytes(out) == read_bytes(tmp_path / "whole")


def children_of(pid: int | str) -> list[str]:
    return [
        child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]


def test_workers_end_with_their_parent_and_a_second_run_is_refused(
    root: Path, pretrain_dir: Path, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    flags = {
        "data_input_dirs": pretrain_dir,
        "tokenizer_dir": llama2_tokenizer_dir,
        "data_output_dirs": tmp_path / "out",
    }
    process = subprocess.Popen(
        command(root, PRETRAIN, **flags, num_workers=2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    workers: list[str] = []
    while process.poll() is None and len(workers) < 2:
        time.sleep(0.02)
        # The server's, from which workers are forked; all of the main process's threads may have started it.
        servers = [
            child
            for child in children_of(process.pid)
            if b"forkserver" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        workers = [worker for server in servers for worker in children_of(server)]
    os.kill(process.pid, signal.SIGSTOP)  # so that it can't finish while the second one starts
    try:
        second = run(root, PRETRAIN, **flags)
        assert second.returncode == 2
        assert f"in use by process {process.pid}" in second.stderr
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{worker}/exe").exists() for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)
