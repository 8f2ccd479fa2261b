"""Whole runs in this process: every record accounted for, bins as asked, JSONL and Arrow the same."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from corpus import sample_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT
from transformers import AutoTokenizer

from colossal_llama.corpus import jsonl
from colossal_llama.corpus.storage import stat_file
from colossal_llama.dataset import bin_stage, bins, encode_stage, shards
from colossal_llama.dataset.bins import deal_documents
from colossal_llama.dataset.held_out import is_held_out
from colossal_llama.dataset.output import OutputPaths
from colossal_llama.dataset.piece_counts import read_piece_counts
from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RecordSettings,
    RowSettings,
    SftSettings,
    WorkerSettings,
)
from colossal_llama.tokenizer import init_tokenizer
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.new_rows import find_new_rows
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories
from colossal_llama.utils.errors import UserError

Prepare = Callable[..., dict[str, Any]]
MAX_LENGTH = 256


class OneToARow(PretrainSettings):
    splice = False


def make_records(count: int, seed: int) -> list[dict[str, str]]:
    generator = random.Random(seed)
    texts = sample_texts(2 * count, seed)
    return [
        {
            "source": texts[2 * i] if generator.random() < 0.3 else "",
            "target": texts[2 * i + 1] * (6 if i % 50 == 7 else 1),
            "category": generator.choice(["a", "b", "b", "c"]),
        }
        for i in range(count)
    ]


def write_records(path: Path, records: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 20_000)


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    write_records(tmp_path / "in0" / "one.jsonl", make_records(300, seed=1))
    write_records(tmp_path / "in0" / "two.jsonl", make_records(50, seed=2))
    write_records(tmp_path / "in1" / "three.jsonl", make_records(120, seed=3))
    return [tmp_path / "in0", tmp_path / "in1"]


@pytest.fixture
def run(tmp_path: Path, llama2_tokenizer_dir: Path) -> Prepare:
    """Prepares with small settings; keyword arguments change them. Returns stats.json."""

    def run(
        inputs: list[Path],
        output: str = "out",
        records: RecordSettings | None = None,
        num_workers: int = 1,
        **changes: Any,
    ) -> dict[str, Any]:
        paths = PathSettings(inputs, tokenizer_dir=llama2_tokenizer_dir, data_output_dirs=tmp_path / output)
        rows = RowSettings(max_length=MAX_LENGTH, num_spliced_dataset_bins=4)
        of_paths = {name: changes.pop(name) for name in list(changes) if hasattr(paths, name)}
        settings = PreparationSettings(
            records or PretrainSettings(),
            dataclasses.replace(paths, **of_paths),
            dataclasses.replace(rows, **changes),
            WorkerSettings(num_workers),
        )
        prepare(settings)
        return json.loads(OutputPaths.of_settings(settings.paths).stats_path.read_text())

    return run


def read_rows(arrow_dir: Path) -> list[list[dict[str, list[int]]]]:
    """The rows of every part."""
    return [list(datasets.load_from_disk(str(part))) for part in sorted(arrow_dir.glob("part-*"))]


def read_bytes(directory: Path) -> dict[str, bytes]:
    """Everything that a run makes but the cache."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).parts[0] != "cache" and path.name != ".lock"
    }


def encode(tokenizer: Any, record: dict[str, str]) -> tuple[int, ...]:
    ids = tokenizer(record["source"] + record["target"], add_special_tokens=False)["input_ids"]
    return (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)


def test_every_document_is_whole_and_in_order(
    corpus: list[Path], run: Prepare, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    stats = run(corpus)
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    records = make_records(300, 1) + make_records(50, 2) + make_records(120, 3)
    wanted: Counter[tuple[int, ...]] = Counter()
    num_chunked = 0
    for document in (encode(tokenizer, record) for record in records):
        wanted.update(document[i : i + MAX_LENGTH] for i in range(0, len(document), MAX_LENGTH))
        num_chunked += len(document) > MAX_LENGTH
    found: Counter[tuple[int, ...]] = Counter()
    parts = read_rows(tmp_path / "out" / "arrow")
    assert len(parts) == 4
    for row in (row for part in parts for row in part):
        ids, labels, lengths = row["input_ids"], row["labels"], row["document_lengths"]
        assert len(ids) == len(labels) == sum(lengths) <= MAX_LENGTH
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        bounds = np.cumsum([0, *lengths])
        found.update(tuple(ids[a:b]) for a, b in pairwise(bounds))
    assert num_chunked > 3
    assert stats["total"]["notes"] == {"chunked": num_chunked}
    dropped = wanted - found
    assert not found - wanted
    # Only chunks that hold nothing but a source may be missing.
    assert sum(map(len, dropped.elements())) == stats["total"]["dropped_tokens"].get("chunk without label", 0)


def test_the_accounts_balance(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    write_records(corpus[0] / "odd.jsonl", [{"source": s, "target": "", "category": "a"} for s in ("", "x")])
    with open(corpus[0] / "odd.jsonl", "ab") as file:
        file.write(b"\n  \r\nnot json\n[]\n{}\n")
    stats = run(corpus, on_bad_record="skip")
    assert stats["records"]["read"] == 475
    assert stats["records"]["kept"] == 470
    assert stats["records"]["dropped"] == {
        "empty record": 1,
        "empty target": 1,
        "'source' missing": 1,
        "not a JSON object": 1,
        "not valid JSON": 1,
    }
    for counts in [stats["total"], *stats["categories"].values(), *stats["input_dirs"]]:
        assert counts["tokens_in"] == counts["tokens_out"] + sum(counts["dropped_tokens"].values())
        assert counts["documents"] == counts["kept"] + sum(counts["dropped_documents"].values())
    for name in ("documents", "kept", "pieces", "characters", "tokens_in", "tokens_out"):
        assert stats["total"][name] == sum(counts[name] for counts in stats["categories"].values())
        assert stats["total"][name] == sum(counts[name] for counts in stats["input_dirs"])
    rows = [row for part in read_rows(tmp_path / "out" / "arrow") for row in part]
    assert stats["rows"]["rows"] == len(rows)
    assert (
        stats["rows"]["tokens"] == sum(len(row["input_ids"]) for row in rows) == stats["total"]["tokens_out"]
    )
    parts = find_part_directories([tmp_path / "out" / "arrow"])
    data = PreparedDataset(parts, MAX_LENGTH, need_documents=True)
    batch = Collator(data, 0, None, True, 1000)(list(range(len(data))))
    assert stats["rows"]["labels"] == int((batch["labels"] != -100).sum())
    assert stats["rows"]["fill_without_last_rows"] > 0.98
    assert sum(stats["piece_lengths"]["counts"]) == stats["total"]["pieces"]
    text = json.dumps(stats)
    assert str(tmp_path) not in text
    assert "workers" not in text


def test_no_row_is_without_loss(run: Prepare, tmp_path: Path, llama2_tokenizer_dir: Path) -> None:
    """A document of a token more than a row holds once left a row of nothing but EOS."""
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    text = sample_texts(1, seed=3)[0]
    num_tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
    write_records(tmp_path / "in" / "x.jsonl", [{"source": "", "target": text, "category": "c"}] * 4)
    stats = run([tmp_path / "in"], records=OneToARow(), max_length=num_tokens - 1)
    rows = [row for part in read_rows(tmp_path / "out" / "arrow") for row in part]
    assert sorted(len(row["labels"]) for row in rows) == [2] * 4 + [num_tokens - 2] * 4
    assert stats["rows"]["labels"] == 4 * (num_tokens - 2)  # neither BOS nor a chunk's first token
    assert stats["total"]["tokens_in"] == stats["total"]["tokens_out"] == 4 * num_tokens


def test_jsonl_equals_arrow_and_the_layout_is_as_documented(
    corpus: list[Path],
    run: Prepare,
    tmp_path: Path,
    llama2_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bins, "BATCH_ROWS", 5)  # several record batches
    run(corpus, num_spliced_dataset_bins=2)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {"arrow", "cache", "jsonl", "stats.json", "stats.png"}
    assert sorted(path.name for path in (out / "jsonl").iterdir()) == ["part-00000.jsonl", "part-00001.jsonl"]
    assert (out / "stats.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    for index, rows in enumerate(read_rows(out / "arrow")):
        lines = (out / "jsonl" / f"part-{index:05d}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows
        part = out / "arrow" / f"part-{index:05d}"
        assert json.loads((part / "prepared.json").read_text()) == {
            "format": 1,
            "kind": "pretrain",
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "max_length": MAX_LENGTH,
            "num_rows": len(rows),
            "num_tokens": sum(len(row["input_ids"]) for row in rows),
        }
        loaded = datasets.load_from_disk(str(part))
        assert loaded.column_names == ["input_ids", "labels", "document_lengths"]
        assert {str(feature.feature.dtype) for feature in loaded.features.values()} == {"int32"}


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.integers(1, 12), st.integers(0, 100))
def test_dealing_is_even_in_every_stratum(strata: list[int], num_bins: int, seed: int) -> None:
    documents, bounds = deal_documents(np.array(strata, dtype=np.int32), num_bins, seed)
    assert sorted(documents.tolist()) == list(range(len(strata)))
    assert len(bounds) == num_bins + 1
    dealt = [np.array(strata)[documents[a:b]] for a, b in pairwise(bounds)]
    for stratum in set(strata):
        counts = [int((part == stratum).sum()) for part in dealt]
        assert max(counts) - min(counts) <= 1
    if len(strata) >= num_bins:
        assert min(map(len, dealt)) >= 1
    again, _ = deal_documents(np.array(strata, dtype=np.int32), num_bins, seed)
    assert again.tolist() == documents.tolist()


@pytest.mark.parametrize("num_bins", [1, 25, 30, 101, 470])
def test_exactly_as_many_bins_as_asked(
    corpus: list[Path], run: Prepare, tmp_path: Path, num_bins: int
) -> None:
    stats = run(corpus, num_spliced_dataset_bins=num_bins)
    parts = read_rows(tmp_path / "out" / "arrow") if num_bins < 101 else []
    assert sorted(p.name for p in (tmp_path / "out" / "arrow").glob("part-*")) == [
        f"part-{index:05d}" for index in range(num_bins)
    ]
    assert all(parts)
    assert len(stats["bins"]) == num_bins
    assert min(b["rows"] for b in stats["bins"]) >= 1


def test_more_bins_than_documents(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only 470 documents; ask for at most 470 bins"):
        run(corpus, num_spliced_dataset_bins=471)
    assert not list((tmp_path / "out").glob("*/part-*"))


def test_the_output_does_not_depend_on_the_number_of_workers(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    run(corpus, "one", num_workers=1)
    run(corpus, "three", num_workers=3)
    one, three = read_bytes(tmp_path / "one"), read_bytes(tmp_path / "three")
    assert len(one) == 4 * 5 + 2
    assert one == three


def test_the_output_depends_on_the_seed(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    run(corpus, "a")
    run(corpus, "b", seed=43)
    a, b = read_bytes(tmp_path / "a"), read_bytes(tmp_path / "b")
    assert a["jsonl/part-00000.jsonl"] != b["jsonl/part-00000.jsonl"]


def test_bad_records_are_all_reported_with_their_lines(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    path = corpus[0] / "one.jsonl"
    lines = path.read_text().splitlines()
    for number in (3, 150, 299):
        lines[number - 1] = '{"source": "", "target": 5, "category": "a"}'
    lines.insert(200, "")
    path.write_text("\n".join(lines))
    write_records(corpus[1] / "z.jsonl", [{"source": ""}])
    assert len(jsonl.make_shards([[stat_file(str(path))]])) > 2
    with pytest.raises(UserError) as caught:
        run(corpus)
    problems = caught.value.problems
    where = [problem.split(": ")[0] for problem in problems[:-1]]
    assert where == [f"{path}:3", f"{path}:150", f"{path}:300", f"{corpus[1] / 'z.jsonl'}:1"]
    assert "'target' is a number, not a string" in problems[0]
    assert "4 bad records ('target' missing: 1, 'target' not a string: 3)" in problems[-1]
    assert "--on_bad_record skip" in problems[-1]
    assert not (tmp_path / "out" / "stats.json").exists()
    assert not list((tmp_path / "out").glob("*/part-*"))


def test_after_a_bad_record_the_rest_is_only_read(
    corpus: list[Path], run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[shards.ShardTask] = []

    def encode_and_remember(task: shards.ShardTask) -> shards.ShardSummary:
        tasks.append(task)
        return shards.encode_shard(task)

    monkeypatch.setattr(encode_stage, "encode_shard", encode_and_remember)
    path = corpus[0] / "one.jsonl"
    path.write_bytes(path.read_bytes() + b"[]\n" * 20_000)
    with pytest.raises(UserError, match="20,000 bad records"):
        run(corpus)
    first_checked = [task.check_only for task in tasks].index(True)
    assert all(task.check_only for task in tasks[first_checked:])
    assert len(list((tmp_path / "out" / "cache" / "shards").glob("*.npz"))) == first_checked
    assert run(corpus, on_bad_record="skip")["records"]["dropped"] == {"not a JSON object": 20_000}


def test_a_long_list_of_bad_records_is_cut(run: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "x.jsonl", [7] * 5000)
    with pytest.raises(UserError) as caught:
        run([tmp_path / "in"])
    assert len(caught.value.problems) == 22
    assert caught.value.problems[-2] == "… and 4,980 more"
    assert "5,000 bad records" in caught.value.problems[-1]


def test_files_of_another_program_stay(run: Prepare, tmp_path: Path, corpus: list[Path]) -> None:
    picture, record = tmp_path / "out" / "stats.png", tmp_path / "out" / "cache" / "run.json"
    picture.parent.mkdir()
    picture.write_bytes(b"theirs")
    with pytest.raises(UserError, match=r"stats\.png: is there already.*--overwrite"):
        run(corpus)
    assert picture.read_bytes() == b"theirs"
    run(corpus, overwrite=True)
    for content in ("[1]", '{"name": "theirs"}'):
        record.write_text(content)
        with pytest.raises(UserError, match=r"run\.json: is there already, and no preparation wrote it"):
            run(corpus, overwrite=True)
        assert record.read_text() == content


def test_existing_output_is_refused_and_overwritten_when_asked(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    run(corpus)
    before = read_bytes(tmp_path / "out")
    foreign = [tmp_path / "out" / "arrow" / "notes.txt", tmp_path / "out" / "cache" / "shards" / "mine.npz"]
    for path in foreign:
        path.write_text("keep me")
    with pytest.raises(UserError, match="--overwrite"):
        run(corpus)
    with pytest.raises(UserError, match="--overwrite"):
        run(corpus, num_spliced_dataset_bins=3)
    stats = run(corpus, num_spliced_dataset_bins=3, overwrite=True)
    assert stats["num_bins"] == 3
    assert len(list((tmp_path / "out" / "arrow").glob("part-*"))) == 3
    assert [path.read_text() for path in foreign] == ["keep me"] * 2
    foreign[0].unlink()
    run(corpus, overwrite=True)
    assert read_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_a_run_that_died_between_bins_goes_on(
    corpus: list[Path], run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    run(corpus, "whole")
    written = []

    def write_some(task: bins.BinTask) -> Any:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(task.index)
        return bins.write_bin(task)

    monkeypatch.setattr(bin_stage, "write_bin", write_some)
    with pytest.raises(KeyboardInterrupt):
        run(corpus)
    assert not (tmp_path / "out" / "stats.json").exists()
    if written:
        with pytest.raises(UserError, match=r"part-0000\d.*is there already"):
            run(corpus, seed=5)

    encoded: list[Any] = []
    monkeypatch.setattr(bin_stage, "write_bin", bins.write_bin)
    monkeypatch.setattr("colossal_llama.dataset.shards.load_encoder", lambda spec: encoded.append(spec))
    run(corpus)
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
    assert not encoded  # every shard came from the cache


def test_a_run_that_died_does_not_go_on_in_another_ones_parts(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    run(corpus[:1], "other")
    before = read_bytes(tmp_path / "other")
    run(corpus)
    (tmp_path / "out" / "stats.json").unlink()  # as a run leaves it that dies at its end
    with pytest.raises(UserError, match="is there already, from another run"):
        run(corpus, data_arrow_output_dir=tmp_path / "other" / "arrow")
    assert read_bytes(tmp_path / "other") == before


def test_a_file_of_nothing_but_a_byte_order_mark_holds_no_record(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    (corpus[0] / "zero.jsonl").write_bytes(jsonl.UTF8_BOM)
    assert run(corpus)["records"]["read"] == 470


def test_tasks_that_run_twice_at_once_and_too_late(
    corpus: list[Path], run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that was given up for dead may still be at work while another does the same again."""
    run(corpus, "whole")
    shard_tasks: list[shards.ShardTask] = []
    bin_tasks: list[bins.BinTask] = []

    def encode_twice(task: shards.ShardTask) -> shards.ShardSummary:
        shard_tasks.append(task)
        with ThreadPoolExecutor() as pool:
            one, other = pool.map(shards.encode_shard, [task, task])
        assert one == other
        return one

    def write_twice(task: bins.BinTask) -> Any:
        bin_tasks.append(task)
        with ThreadPoolExecutor() as pool:
            one, other = pool.map(bins.write_bin, [task, task])
        assert one == other
        return one

    monkeypatch.setattr(encode_stage, "encode_shard", encode_twice)
    monkeypatch.setattr(bin_stage, "write_bin", write_twice)
    run(corpus)
    monkeypatch.undo()
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 20_000)
    run(corpus, seed=43, overwrite=True)
    after = read_bytes(tmp_path / "out")
    with pytest.raises(UserError, match="another run has taken over"):
        bins.write_bin(bin_tasks[0])
    assert read_bytes(tmp_path / "out") == after
    assert not list((tmp_path / "out").rglob("*.tmp"))
    for path in [shard_tasks[0].cache_dir, *dataclasses.asdict(bin_tasks[0]).values()]:
        assert not isinstance(path, str) or "/" not in path or Path(path).is_absolute()


@pytest.mark.parametrize(("hard", "max_open"), [(4096, 3000), (600, 344), (100, 1)])
def test_as_many_shards_are_open_as_the_system_allows(hard: int, max_open: int) -> None:
    code = (
        "import resource\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, {hard}), {hard}))\n"
        "from colossal_llama.dataset.bins import _allow_open_files\n"
        "print(_allow_open_files(3000))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(result.stdout) == max_open


def test_tasks_hold_names_and_lengths_only(
    corpus: list[Path], run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a task and its result weigh does not grow with the corpus."""
    sizes: dict[int, list[int]] = {}

    def weigh(function: Callable[[Any], Any], number: int) -> Callable[[Any], Any]:
        def run_and_weigh(task: Any) -> Any:
            result = function(task)
            sizes.setdefault(number, []).append(len(pickle.dumps((task, result))))
            return result

        return run_and_weigh

    write_records(tmp_path / "large" / "x.jsonl", make_records(3000, seed=1))
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 1 << 30)
    for number, inputs in enumerate((corpus[:1], [tmp_path / "large"])):
        monkeypatch.setattr(encode_stage, "encode_shard", weigh(shards.encode_shard, number))
        monkeypatch.setattr(bin_stage, "write_bin", weigh(bins.write_bin, number))
        run(inputs, f"out{number}")
    assert max(sizes[1]) < 1.1 * max(sizes[0]) < 10_000


def test_damaged_cache_is_encoded_again(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    run(corpus)
    before = read_bytes(tmp_path / "out")
    first, second, *_ = sorted((tmp_path / "out" / "cache" / "shards").glob("*.tokens"))
    first.write_bytes(first.read_bytes()[:-4])
    second.unlink()
    run(corpus, overwrite=True)
    assert read_bytes(tmp_path / "out") == before


def test_changed_input_is_encoded_again(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    before = run(corpus)
    write_records(corpus[0] / "two.jsonl", make_records(60, seed=9))
    after = run(corpus, overwrite=True)
    assert after["records"]["read"] == before["records"]["read"] + 10
    fresh = run(corpus, "fresh")
    assert fresh == after


def test_conversations_are_one_to_a_row_unless_spliced(run: Prepare, tmp_path: Path) -> None:
    texts = sample_texts(240, seed=5, max_sentences=1)
    records = [
        {
            "messages": [
                {"from": "human", "content": texts[2 * i]},
                {"from": "assistant", "content": texts[2 * i + 1]},
            ],
            "category": "ab"[i % 2],
        }
        for i in range(120)
    ]
    write_records(tmp_path / "sft" / "x.jsonl", records)
    single = run([tmp_path / "sft"], "single", SftSettings(2, splice=False), max_length=1024)
    packed = run([tmp_path / "sft"], "packed", SftSettings(2, splice=True), max_length=1024)
    rows = [row for part in read_rows(tmp_path / "single" / "arrow") for row in part]
    assert len(rows) == single["total"]["kept"] == 120
    assert all(row["document_lengths"] == [len(row["input_ids"])] for row in rows)
    assert packed["rows"]["rows"] < 120
    assert packed["rows"]["tokens"] == single["rows"]["tokens"]
    assert packed["rows"]["labels"] == single["rows"]["labels"]
    packed_rows = [row for part in read_rows(tmp_path / "packed" / "arrow") for row in part]
    documents = []
    for row in packed_rows:
        bounds = np.cumsum([0, *row["document_lengths"]])
        documents += [row["input_ids"][a:b] for a, b in pairwise(bounds)]
    assert sorted(documents) == sorted(row["input_ids"] for row in rows)


def test_nothing_left_to_write(run: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "x.jsonl", [{"source": "", "target": "", "category": "a"}])
    with pytest.raises(UserError, match="nothing is left to write"):
        run([tmp_path / "in"], num_spliced_dataset_bins=1)


def test_a_directory_without_tokenizer(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--tokenizer_dir .*no tokenizer can be loaded"):
        run(corpus, tokenizer_dir=tmp_path / "empty")


SHARE = 0.25


def read_held_out(output: Path) -> list[dict[str, str]]:
    """The records of all held-out files."""
    return [
        json.loads(line)
        for path in sorted((output / "held_out").glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def read_documents(arrow_dir: Path) -> Counter[tuple[int, ...]]:
    """The documents of all rows, as `encode` makes them where none is longer than a row."""
    found: Counter[tuple[int, ...]] = Counter()
    for row in (row for part in read_rows(arrow_dir) for row in part):
        bounds = np.cumsum([0, *row["document_lengths"]])
        found.update(tuple(row["input_ids"][a:b]) for a, b in pairwise(bounds))
    return found


def test_held_out_records_are_whole_and_nowhere_else(
    run: Prepare, tmp_path: Path, llama2_tokenizer_dir: Path
) -> None:
    short = [record for record in make_records(260, seed=5) if len(record["target"]) < 400]
    twice = [{**record, "category": "again"} for record in short[:60]]
    write_records(tmp_path / "in0" / "x.jsonl", short)
    write_records(tmp_path / "in1" / "x.jsonl", [*twice, {"source": "a", "target": "", "category": "a"}])
    stats = run([tmp_path / "in0", tmp_path / "in1"], held_out_share=SHARE, max_length=2048)
    records = read_held_out(tmp_path / "out")
    all_records = short + twice
    assert [r for r in all_records if is_held_out(r["source"] + r["target"], SHARE)] == records
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    wanted = Counter(encode(tokenizer, record) for record in records)
    assert read_documents(tmp_path / "out" / "held_out" / "arrow") == wanted
    trained = read_documents(tmp_path / "out" / "arrow")
    assert trained + wanted == Counter(encode(tokenizer, record) for record in all_records)
    assert not trained.keys() & wanted.keys()  # equal texts are on the same side

    counts = stats["held_out"]
    assert stats["records"] == {
        "read": len(all_records) + 1,
        "kept": trained.total(),
        "held_out": len(records),
        "dropped": {"empty target": 1},
    }
    assert counts["share"] == stats["held_out_share"] == SHARE
    for side in (stats, counts):
        total = side["total"]
        assert total["tokens_in"] == total["tokens_out"] + sum(total["dropped_tokens"].values())
        for group in (side["categories"].values(), side["input_dirs"]):
            assert sum(one["tokens_out"] for one in group) == total["tokens_out"]
    assert [part["input_dir"] for part in counts["parts"]] == [0, 1]
    assert sum(part["tokens"] for part in counts["parts"]) == counts["total"]["tokens_out"]
    assert counts["categories"]["again"]["documents"] == counts["input_dirs"][1]["documents"]

    parts = find_part_directories([tmp_path / "out" / "held_out" / "arrow"])
    data = PreparedDataset(parts, 2048, True, tokenizer_fingerprint(tokenizer))
    assert data.num_tokens == counts["total"]["tokens_out"]


def test_held_out_text_depends_on_nothing_but_the_text(
    corpus: list[Path], run: Prepare, tmp_path: Path
) -> None:
    run(corpus, held_out_share=SHARE)
    before = read_bytes(tmp_path / "out")
    run(corpus, "two", num_workers=2, held_out_share=SHARE)
    assert read_bytes(tmp_path / "two") == before
    run(corpus, "other", seed=7, max_length=100, num_spliced_dataset_bins=2, held_out_share=SHARE)
    assert read_held_out(tmp_path / "other") == read_held_out(tmp_path / "out") != []


@pytest.mark.parametrize("stop_after", [0, 3, 5])
def test_a_run_that_died_holds_out_the_same(
    corpus: list[Path], run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    run(corpus, "whole", held_out_share=SHARE)
    written = []

    def write_some(task: bins.BinTask) -> Any:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(task.index)
        return bins.write_bin(task)

    monkeypatch.setattr(bin_stage, "write_bin", write_some)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, held_out_share=SHARE)
    if written:
        with pytest.raises(UserError, match=r"part-0000\d.*is there already"):
            run(corpus)
    monkeypatch.setattr(bin_stage, "write_bin", bins.write_bin)
    shards_dir = tmp_path / "out" / "cache" / "shards"
    damaged = min(shards_dir.glob("*.jsonl"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run(corpus, held_out_share=SHARE)
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")


def test_without_a_share_nothing_of_it_stays(corpus: list[Path], run: Prepare, tmp_path: Path) -> None:
    run(corpus, "plain")
    assert not (tmp_path / "plain" / "held_out").exists()
    run(corpus, held_out_share=SHARE)
    run(corpus, overwrite=True)
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "plain")


def test_a_share_that_holds_out_nothing(run: Prepare, tmp_path: Path) -> None:
    write_records(tmp_path / "in" / "x.jsonl", make_records(8, seed=1))
    with pytest.raises(UserError, match="--held_out_share 1e-09: none of the 8 documents falls into the"):
        run([tmp_path / "in"], held_out_share=1e-9)
    with pytest.raises(UserError, match=r"only \d documents beside \d that are held out; ask for at most"):
        run([tmp_path / "in"], "b", held_out_share=0.9, num_spliced_dataset_bins=8)


def test_conversations_are_held_out(run: Prepare, tmp_path: Path) -> None:
    values = [
        {"messages": [{"from": "human", "content": f"q {i}"}, {"from": "assistant", "content": f"a {i}"}]}
        for i in range(40)
    ]
    write_records(tmp_path / "in" / "x.jsonl", values)
    stats = run([tmp_path / "in"], records=SftSettings(llama_version=2), held_out_share=SHARE)
    held_out = read_held_out(tmp_path / "out")
    assert 0 < len(held_out) == stats["records"]["held_out"] == 40 - stats["records"]["kept"]
    assert [{"messages": record["messages"]} for record in held_out] == [
        value for value in values if is_held_out("\0".join(m["content"] for m in value["messages"]), SHARE)
    ]
    again = run([tmp_path / "out" / "held_out"], "again", SftSettings(llama_version=2))
    assert again["total"]["tokens_in"] == stats["held_out"]["total"]["tokens_in"]


def test_new_pieces_are_counted(
    corpus: list[Path],
    run: Prepare,
    tmp_path: Path,
    llama2_tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces, extended = tmp_path / "pieces.jsonl", tmp_path / "extended"
    write_records(pieces, [{"piece": piece} for piece in ["河流", "学习", "江", "qzxq", "鑿"]])
    flags = {
        "source_tokenizer_dir": llama2_tokenizer_dir,
        "target_tokenizer_dir": extended,
        "expand_tokens_file": pieces,
        "unreachable": "add",
    }
    monkeypatch.setattr("sys.argv", ["script", *(f"--{name}={value}" for name, value in flags.items())])
    init_tokenizer.main()
    new_rows = find_new_rows(extended)
    assert new_rows == range(len(AutoTokenizer.from_pretrained(llama2_tokenizer_dir)), new_rows.stop)
    assert len(AutoTokenizer.from_pretrained(extended)) == new_rows.stop

    stats = run(corpus, tokenizer_dir=extended, held_out_share=SHARE)
    arrow = tmp_path / "out" / "arrow"
    found = Counter(
        token for part in read_rows(arrow) for row in part for token in row["input_ids"] if token in new_rows
    )
    assert found
    parts = find_part_directories([arrow])
    counts = read_piece_counts(parts, new_rows)
    assert counts is not None
    assert counts.tolist() == [found[token] for token in new_rows]
    assert stats["new_pieces"] == {
        "pieces": len(new_rows),
        "occurrences": found.total(),
        "never": sum(found[token] == 0 for token in new_rows),
        "under_10": sum(found[token] < 10 for token in new_rows),
        "under_100": sum(found[token] < 100 for token in new_rows),
    }
    some = read_piece_counts(parts[:2], new_rows)
    assert some is not None
    assert 0 < some.sum() < counts.sum()
    (parts[1] / "new_pieces.json").unlink()  # as an earlier version left it
    assert read_piece_counts(parts, new_rows) is None
    assert "new_pieces" not in run(corpus, "plain")
    assert not list((tmp_path / "plain").rglob("new_pieces.json"))
