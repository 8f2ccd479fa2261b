"""What `--dry_run` says of new pieces, counted by hand in prepared data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from corpus import sample_texts
from plugin_cases import make_config
from transformers import AutoTokenizer

from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    WorkerSettings,
)
from colossal_llama.tokenizer.init_tokenizer import TokenizerSettings, extend, write_tokenizer
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories, sum_lengths
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.extension_report import report_extension


def write_lines(path: Path, values: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def extend_tokenizer(source: Path, directory: Path) -> Path:
    pieces = write_lines(directory / "pieces.jsonl", [{"piece": p} for p in ["人工智能", "的", "鑿"]])
    settings = TokenizerSettings(source, directory / "extended", pieces, "add")
    write_tokenizer(settings, *extend(settings))
    return directory / "extended"


@pytest.fixture
def extended(tmp_path: Path, llama2_tokenizer_dir: Path) -> Path:
    return extend_tokenizer(llama2_tokenizer_dir, tmp_path)


@pytest.fixture
def dataset(tmp_path: Path, extended: Path) -> PreparedDataset:
    return prepare_texts(tmp_path, extended)


def prepare_texts(tmp_path: Path, extended: Path) -> PreparedDataset:
    texts = [f"{text} 人工智能的" for text in sample_texts(60, seed=2)]
    records = [{"source": "", "target": text, "category": "a"} for text in texts]
    write_lines(tmp_path / "in" / "x.jsonl", records)
    paths = PathSettings([tmp_path / "in"], tokenizer_dir=extended, data_output_dirs=tmp_path / "data")
    rows = RowSettings(max_length=512, num_spliced_dataset_bins=2)
    prepare(PreparationSettings(PretrainSettings(), paths, rows, WorkerSettings(1)))
    return PreparedDataset(find_part_directories([tmp_path / "data" / "arrow"]), 512, True)


def test_saved_tokens_and_rare_pieces(
    extended: Path, dataset: PreparedDataset, llama2_tokenizer_dir: Path, tmp_path: Path
) -> None:
    base = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(extended)
    config = make_config(vocab_size=len(tokenizer) + 3)
    report = report_extension(str(extended), config, dataset)
    assert report is not None
    assert report.bill is not None
    ids = np.concatenate([dataset[row].input_ids for row in range(len(dataset))])
    assert report.bill.tokens == len(ids)
    assert report.bill.occurrences == (ids >= len(base)).sum()
    assert report.counts is not None
    counts = dict(zip(report.names, report.counts.tolist(), strict=True))
    assert counts["人工智能"] >= 60
    assert counts["鑿"] == 0
    # What the base makes of the same texts: its tokens do not join across new pieces here.
    lines = [json.loads(line)["target"] for line in (tmp_path / "in" / "x.jsonl").read_text().splitlines()]
    assert report.bill.base_tokens == sum(len(base(line).input_ids) + 1 for line in lines)
    assert report.bill.parameters - report.bill.base_parameters == 2 * 64 * (config.vocab_size - len(base))
    warning = report.rare_pieces()
    assert warning is not None
    never = sum(count == 0 for count in counts.values())
    assert f"of {len(counts):,} new pieces, {never:,} never occur" in warning
    assert "鑿" in warning
    assert "on --dataset, about" in report.describe()


def test_pieces_of_bytes_are_named_as_people_read_them(tmp_path: Path, llama3_tokenizer_dir: Path) -> None:
    extended = extend_tokenizer(llama3_tokenizer_dir, tmp_path)
    config = make_config(vocab_size=len(AutoTokenizer.from_pretrained(extended)))
    report = report_extension(str(extended), config, prepare_texts(tmp_path, extended))
    assert report is not None
    assert {"人工智能", "的", "鑿"} < set(report.names)
    assert r"\xe9\x91" in report.names  # the first two bytes of 鑿
    assert "鑿" in str(report.rare_pieces())


def test_where_nothing_is_known(extended: Path, dataset: PreparedDataset, llama2_tokenizer_dir: Path) -> None:
    config = make_config()
    assert report_extension(str(llama2_tokenizer_dir), config, dataset) is None
    assert report_extension("some/model", config, dataset) is None
    assert report_extension(str(extended), config, RandomRows(4, 8, 100, 0)) is None
    (dataset.paths[1] / "new_pieces.json").unlink()
    report = report_extension(str(extended), config, dataset)
    assert report is not None
    assert report.rare_pieces() is None
    assert "an earlier version prepared it" in report.describe()


def test_sums_of_lengths(dataset: PreparedDataset) -> None:
    rows = [dataset[row] for row in range(len(dataset))]
    lengths = np.concatenate([row.document_lengths for row in rows]).astype(float)
    assert sum_lengths(dataset, True) == (lengths.sum(), (lengths**2).sum())
    whole = np.array([len(row.input_ids) for row in rows], dtype=float)
    assert sum_lengths(dataset, False) == (whole.sum(), (whole**2).sum())
    assert sum_lengths(RandomRows(5, 8, 100, 0), True) == (40, 5 * 64)
