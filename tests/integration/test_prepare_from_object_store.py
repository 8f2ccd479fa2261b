"""The prepare scripts on `s3://` input: a real object store in another process, the bytes of a local run."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from corpus import sample_texts
from moto.server import ThreadedMotoServer
from support import ROOT


@pytest.fixture(scope="module")
def object_store() -> Iterator[tuple[object, dict[str, str]]]:
    """(client, environment for commands) of an S3 server with the bucket `corpora`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            client = boto3.client("s3")
            client.create_bucket(Bucket="corpora")
            yield client, environment
    finally:
        server.stop()


def prepare(environment: dict[str, str], **flags: object) -> subprocess.CompletedProcess[str]:
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_pretrain_dataset.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def read_bytes(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != "cache" and path.name != ".lock"
    }


def test_the_same_bytes_as_from_a_directory(
    object_store: tuple, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    client, environment = object_store
    generator = random.Random(0)
    texts = sample_texts(500, seed=4)
    for name, count in (("b.jsonl", 5000), ("a.jsonl", 100)):
        directory = tmp_path / "in" / name[0]
        directory.mkdir(parents=True)
        with open(directory / name, "w", encoding="utf-8") as file:
            for _ in range(count):
                target = " ".join(generator.choices(texts, k=5))
                record = {"source": "", "target": target, "category": generator.choice("xy")}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        client.upload_file(str(directory / name), "corpora", f"some/{name[0]}/{name}")
    assert (tmp_path / "in" / "b" / "b.jsonl").stat().st_size > 2 << 20  # so several shards
    flags = {
        "tokenizer_dir": llama2_tokenizer_dir,
        "num_workers": 2,
        "num_spliced_dataset_bins": 3,
        "max_length": 512,
    }
    inputs = {
        "local": ",".join(str(tmp_path / "in" / name) for name in "ab"),
        "remote": "s3://corpora/some/a,s3://corpora/some/b/",
    }
    for output, data_input_dirs in inputs.items():
        result = prepare(
            environment, **flags, data_input_dirs=data_input_dirs, data_output_dirs=tmp_path / output
        )
        assert result.returncode == 0, result.stderr
    assert read_bytes(tmp_path / "remote") == read_bytes(tmp_path / "local")
    again = prepare(
        environment,
        **flags,
        data_input_dirs=inputs["remote"],
        data_output_dirs=tmp_path / "remote",
        overwrite=True,
    )
    assert again.returncode == 0, again.stderr
    assert "4 of 4 shards are in the cache" in again.stdout or "3 of 3 shards" in again.stdout
    assert read_bytes(tmp_path / "remote") == read_bytes(tmp_path / "local")


def test_what_is_not_there(object_store: tuple, tmp_path: Path, llama2_tokenizer_dir: Path) -> None:
    client, environment = object_store
    client.put_object(Bucket="corpora", Key="bad/x.jsonl", Body=b'{"source": ""}\n')
    flags = {"tokenizer_dir": llama2_tokenizer_dir, "num_spliced_dataset_bins": 1}
    result = prepare(
        environment,
        **flags,
        data_input_dirs="s3://corpora/nothing,s3://no-such-bucket/x",
        data_output_dirs=tmp_path / "out",
    )
    assert result.returncode == 2
    assert "--data_input_dirs s3://corpora/nothing: no such file or directory" in result.stderr
    assert "--data_input_dirs s3://no-such-bucket/x: no such file or directory" in result.stderr
    assert "Traceback" not in result.stderr
    result = prepare(
        environment, **flags, data_input_dirs="s3://corpora/bad", data_output_dirs=tmp_path / "out"
    )
    assert result.returncode == 2
    assert "s3://corpora/bad/x.jsonl:1: 'target' is missing" in result.stderr
