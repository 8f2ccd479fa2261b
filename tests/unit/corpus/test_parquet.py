"""Rows of Parquet files are records, whatever the shards that they are read in."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from colossal_llama.corpus import jsonl
from colossal_llama.tokenizer.corpus_texts import read_samples
from colossal_llama.utils.errors import UserError

ROWS = [{"text": f"長江 {i}", "n": i, "none": None, "list": [{"a": "b" * i}]} for i in range(1000)]


def write(path: Path, rows: list[dict], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_every_row_once_in_order(
    use_dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.parquet", ROWS, row_group_size=70, use_dictionary=use_dictionary)
    for step in (1 << 30, 20_000, 3_000):
        monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", step)
        monkeypatch.setattr(jsonl, "MIN_PARQUET_SHARD_BYTES", step)
        shards = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
        assert (len(shards) > 1) == (step < 1 << 30)
        assert [row for shard in shards for row in jsonl.read_records(shard)] == ROWS


def test_the_columns_that_are_wanted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS[:2])
    (shard,) = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    assert list(jsonl.read_records(shard, ("text", "other"))) == [{"text": row["text"]} for row in ROWS[:2]]
    assert list(jsonl.read_records(shard, ("other",))) == ROWS[:2]


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS[:1])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "a.parquet")
    (shard,) = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    assert list(jsonl.read_records(shard)) == []


def test_a_damaged_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    (shard,) = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file, or a damaged one"):
        list(jsonl.read_records(shard))


def test_the_corpus_of_a_tokenizer(tmp_path: Path) -> None:
    record = {"source": "a", "target": "b"}
    write(tmp_path / "a.parquet", [record])
    (tmp_path / "b.jsonl").write_text(json.dumps(record))
    assert list(read_samples([tmp_path])) == ["ab", "ab"]
