"""From bins to batches: which rows a rank sees in which step, and what the collator makes of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from corpus import sample_texts
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.data import order, prepared_rows
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.loader import make_loader
from colossal_llama.training.data.order import BatchShape, EvaluationSampler, RowOrder, StepSampler
from colossal_llama.training.data.prepared_rows import PreparedDataset, find_part_directories
from colossal_llama.training.data.random_rows import RandomRows
from colossal_llama.training.data.rows import Row
from colossal_llama.utils.errors import UserError

IGNORED = -100


class ListSource:
    """Rows from a list; one bucket for each of `bucket_sizes`, all rows in one when it is not given."""

    def __init__(self, rows: list[Row], bucket_sizes: list[int] | None = None) -> None:
        self.rows = rows
        self.num_tokens = sum(len(row.input_ids) for row in rows)
        self.fingerprint = ""
        ends = np.cumsum(bucket_sizes or [len(rows)]).tolist()
        self.bucket_ranges = [[(start, end)] for start, end in zip([0, *ends], ends, strict=False)]
        self.sets = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def describe_row(self, index: int) -> str:
        return f"list row {index}"


def make_row(documents: list[list[int]], labels: list[int] | None = None) -> Row:
    tokens = [token for document in documents for token in document]
    return Row(
        np.array(tokens, dtype=np.int32),
        np.array(tokens if labels is None else labels, dtype=np.int32),
        np.array([len(document) for document in documents], dtype=np.int32),
    )


def numbered_source(num_rows: int, bucket_sizes: list[int] | None = None) -> ListSource:
    return ListSource([make_row([[row]]) for row in range(num_rows)], bucket_sizes)


# The collator


@pytest.mark.parametrize("rows_at_once", [1 << 20, 100, 3])
def test_order_of_any_number_of_piles_is_a_permutation(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setattr(order, "_ROWS_AT_ONCE", rows_at_once)
    source = RandomRows(1000, 4, 50, 0)
    source.bucket_ranges = [[(0, 7), (300, 1000)], [(7, 300)]]
    whole, in_buckets = (RowOrder(source, 1, bucketed).permutation(2).tolist() for bucketed in (False, True))
    assert sorted(whole) == sorted(in_buckets) == list(range(1000))
    assert sorted(in_buckets[707:]) == list(range(7, 300))
    if rows_at_once == 1 << 20:
        plain = np.arange(1000)
        np.random.default_rng([1, 2, 0]).shuffle(plain)
        assert whole == plain.tolist()


@pytest.mark.parametrize("rows_at_once", [4, 2, 1])
def test_every_order_is_as_likely_as_any_other(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(order, "_ROWS_AT_ONCE", rows_at_once)
    source, num_draws = numbered_source(4), 4800
    orders = Counter(
        tuple(RowOrder(source, seed, bucketed=False).permutation(0)) for seed in range(num_draws)
    )
    assert len(orders) == 24
    expected = num_draws / 24
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square < 49.7  # exceeded once in 1,000 times with 23 degrees of freedom


def test_the_collators_docstring_example() -> None:
    drawn = {
        line.split()[0]: line.split()[1:13]
        for line in Collator.__doc__.splitlines()
        if line.strip().startswith(("input_ids", "labels", "position_ids", "document_index"))
    }
    a, b, c, d, e, f, g, h, pad = range(1, 10)
    source = ListSource([make_row([[a, b, c], [d, e]]), make_row([[f, g, h]])])
    batch = Collator(source, pad, pad_to=6, isolate_documents=True, vocab_size=10)([0, 1])
    symbols = {**dict(zip("abcdefgh", range(1, 9), strict=True)), ".": pad}

    def read(name: str, dash: int = IGNORED) -> list[int]:
        values = {**symbols, "-": dash, **{str(digit): digit for digit in range(10)}}
        return [values[symbol] for symbol in drawn[name]]

    assert batch["input_ids"].flatten().tolist() == read("input_ids")
    assert batch["labels"].flatten().tolist() == read("labels")
    assert batch["position_ids"].flatten().tolist() == read("position_ids")
    assert batch["document_index"].flatten().tolist() == read("document_index", dash=-1)
    assert batch["row_index"].tolist() == [0, 1]
    assert batch["num_tokens"] == 8
    assert batch["problem"] is None


def reference_row(row: Row, length: int, pad: int, isolate: bool) -> list[tuple[int, int, int, int]]:
    """(token, label, position, document) of each position, one at a time."""
    lengths = row.document_lengths.tolist() if isolate else [len(row.input_ids)]
    result, start = [], 0
    for document, num_tokens in enumerate(lengths):
        for position in range(num_tokens):
            at = start + position
            is_last = position == num_tokens - 1
            label = IGNORED if is_last else int(row.labels[at + 1])
            result.append((int(row.input_ids[at]), label, position, document))
        start += num_tokens
    padding = [(pad, IGNORED, position, -1) for position in range(length - start)]
    return result + padding


@st.composite
def rows_of_documents(draw: st.DrawFn) -> Row:
    documents = draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=8), min_size=1, max_size=5))
    num_tokens = sum(map(len, documents))
    has_loss = draw(st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens))
    tokens = [token for document in documents for token in document]
    return make_row(
        documents, [token if loss else IGNORED for token, loss in zip(tokens, has_loss, strict=True)]
    )


@settings(deadline=None)
@given(
    st.lists(st.one_of(rows_of_documents(), st.none()), min_size=1, max_size=4),
    st.booleans(),
    st.booleans(),
    st.integers(1, 5),
)
def test_collator_equals_a_slow_reference(
    rows: list[Row | None], isolate: bool, to_longest: bool, multiple: int
) -> None:
    source = ListSource([row for row in rows if row is not None])
    numbers = iter(range(len(source)))
    asked = [None if row is None else next(numbers) for row in rows]
    pad_to = None if to_longest else 40
    collator = Collator(source, 7, pad_to, isolate, vocab_size=100, multiple_of=multiple)
    batch = collator(asked)

    length = pad_to or max((len(row.input_ids) for row in rows if row is not None), default=1)
    length = (length + multiple - 1) // multiple * multiple
    empty = make_row([])
    expected = torch.tensor([reference_row(row or empty, length, 7, isolate) for row in rows])
    names = ("input_ids", "labels", "position_ids", "document_index")
    for place, name in enumerate(names):
        assert torch.equal(batch[name], expected[..., place]), name
        assert batch[name].dtype == torch.int64
    assert batch["row_index"].tolist() == [-1 if number is None else number for number in asked]
    assert batch["num_tokens"] == source.num_tokens


@given(rows_of_documents())
def test_loss_of_a_row_is_that_of_its_documents_alone(row: Row) -> None:
    together = Collator(ListSource([row]), 0, None, isolate_documents=True, vocab_size=100)([0])
    offsets = np.concatenate([[0], np.cumsum(row.document_lengths)])
    alone = [
        Row(row.input_ids[start:end], row.labels[start:end], np.array([end - start]))
        for start, end in pairwise(offsets)
    ]
    collator = Collator(ListSource(alone), 0, None, isolate_documents=True, vocab_size=100)
    for name in ("input_ids", "labels", "position_ids"):
        parts = [collator([number])[name][0] for number in range(len(alone))]
        assert torch.equal(together[name][0], torch.cat(parts))


def test_without_isolation_a_documents_first_token_has_loss() -> None:
    source = ListSource([make_row([[1, 2], [3, 4]])])
    batch = Collator(source, 0, 4, isolate_documents=False, vocab_size=10)([0])
    assert batch["labels"].tolist() == [[2, 3, 4, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]]
    assert batch["document_index"].tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("pad_to", [None, 3])
def test_a_row_without_tokens_is_padding(pad_to: int | None) -> None:
    batch = Collator(ListSource([make_row([])]), 5, pad_to, isolate_documents=True, vocab_size=10)([0])
    length = pad_to or 1
    assert batch["input_ids"].tolist() == [[5] * length]
    assert batch["labels"].tolist() == [[IGNORED] * length]
    assert batch["document_index"].tolist() == [[-1] * length]
    assert batch["num_tokens"] == 0


@pytest.mark.parametrize("token", [10, -1])
def test_a_token_outside_the_vocabulary_names_row_and_token(token: int) -> None:
    source = ListSource([make_row([[1]]), make_row([[1, token, 3]])])
    problem = Collator(source, 0, 4, True, vocab_size=10)([0, 1])["problem"]
    assert "list row 1" in problem
    assert f"token {token}," in problem
    assert "10 embeddings" in problem


def test_document_lengths_that_do_not_add_up_are_reported() -> None:
    row = make_row([[1, 2], [3]])
    row.document_lengths = np.array([2, 2])
    problem = Collator(ListSource([row]), 0, 4, True, vocab_size=10)([0])["problem"]
    assert "list row 0: document_lengths sum to 4, the row has 3 tokens" in problem


# The order of rows


def rows_of_steps(
    order: RowOrder,
    batch: int,
    accumulation: int,
    dp_size: int,
    epochs: int,
    epoch: int = 0,
    position: int = 0,
) -> list[list[int]]:
    """The rows of each optimizer step, over all ranks, in the order of the deal."""
    ranks = [
        list(StepSampler(order, BatchShape(batch, accumulation, dp_size, rank), epoch, position, epochs))
        for rank in range(dp_size)
    ]
    passes = [[row for micro_batch in same for row in micro_batch] for same in zip(*ranks, strict=True)]
    assert len(passes) % accumulation == 0
    return [
        [row for one in passes[start : start + accumulation] for row in one]
        for start in range(0, len(passes), accumulation)
    ]


@settings(deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 9),
)
def test_all_ranks_together_take_consecutive_slices_of_the_order(
    num_rows: int, batch: int, accumulation: int, dp_size: int, epochs: int, seed: int
) -> None:
    order = RowOrder(numbered_source(num_rows), seed, bucketed=False)
    step_rows = batch * accumulation * dp_size
    expected = []
    for epoch in range(epochs):
        rows = order.permutation(epoch).tolist()
        whole = len(rows) // step_rows * step_rows
        expected += [rows[start : start + step_rows] for start in range(0, whole, step_rows)]
    assert rows_of_steps(order, batch, accumulation, dp_size, epochs) == expected


@settings(deadline=None)
@given(st.sampled_from([1, 2, 6, 8, 12]), st.integers(1, 50), st.integers(0, 9))
def test_a_step_uses_the_same_rows_in_every_factorisation(step_rows: int, num_rows: int, seed: int) -> None:
    order = RowOrder(numbered_source(num_rows), seed, bucketed=False)
    divisors = [n for n in range(1, step_rows + 1) if step_rows % n == 0]
    factorisations = [
        (batch, accumulation, step_rows // batch // accumulation)
        for batch in divisors
        for accumulation in divisors
        if step_rows % (batch * accumulation) == 0
    ]
    results = [rows_of_steps(order, *factors, epochs=2) for factors in factorisations]
    assert all(result == results[0] for result in results)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data())
def test_resuming_at_any_step_gives_the_tail(
    num_rows: int, batch: int, accumulation: int, dp_size: int, data: st.DataObject
) -> None:
    order = RowOrder(numbered_source(num_rows), seed=3, bucketed=False)
    step_rows, epochs = batch * accumulation * dp_size, 3
    whole = rows_of_steps(order, batch, accumulation, dp_size, epochs)
    per_epoch = num_rows // step_rows
    steps_done = data.draw(st.integers(0, per_epoch * epochs))
    epoch, position = divmod(steps_done, per_epoch) if per_epoch else (0, 0)
    tail = rows_of_steps(order, batch, accumulation, dp_size, epochs, epoch, position * step_rows)
    assert tail == whole[steps_done:]
    if per_epoch and position == 0 and epoch:
        # The end of an epoch may also be saved as a position behind its last step.
        same = rows_of_steps(order, batch, accumulation, dp_size, epochs, epoch - 1, per_epoch * step_rows)
        assert same == tail


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 5))
def test_every_epoch_is_a_permutation_fixed_by_seed_and_epoch(num_rows: int, seed: int, epoch: int) -> None:
    order = RowOrder(numbered_source(num_rows), seed, bucketed=False)
    assert sorted(order.permutation(epoch).tolist()) == list(range(num_rows))
    again = RowOrder(numbered_source(num_rows), seed, bucketed=False)
    assert np.array_equal(order.permutation(epoch), again.permutation(epoch))


def test_epochs_and_seeds_differ() -> None:
    source = numbered_source(100)
    orders = [
        RowOrder(source, seed, False).permutation(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 3))
def test_buckets_come_in_order_and_are_shuffled_inside(sizes: list[int], epoch: int) -> None:
    order = RowOrder(numbered_source(sum(sizes), sizes), seed=1, bucketed=True).permutation(epoch).tolist()
    start = 0
    for size in sizes:
        assert sorted(order[start : start + size]) == list(range(start, start + size))
        start += size


def test_a_bucket_is_not_left_in_its_stored_order() -> None:
    order = RowOrder(numbered_source(60, [30, 30]), seed=1, bucketed=True).permutation(0).tolist()
    assert order[:30] != list(range(30))
    assert order[30:] != [row + 30 for row in order[:30]]


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 4))
def test_evaluation_covers_each_row_once(num_rows: int, batch: int, dp_size: int) -> None:
    ranks = [
        list(EvaluationSampler(num_rows, BatchShape(batch, 3, dp_size, rank))) for rank in range(dp_size)
    ]
    samplers = [EvaluationSampler(num_rows, BatchShape(batch, 3, dp_size, rank)) for rank in range(dp_size)]
    assert {len(batches) for batches in ranks} == {len(sampler) for sampler in samplers}
    assert all(len(one) == batch for batches in ranks for one in batches)
    rows = [row for batches in ranks for one in batches for row in one if row is not None]
    assert sorted(rows) == list(range(num_rows))


# Prepared bins


def write_part(path: Path, rows: list[Row], fingerprint: str | None = None) -> Path:
    columns = ("input_ids", "labels", "document_lengths")
    content = {name: [getattr(row, name).tolist() for row in rows] for name in columns}
    features = datasets.Features({name: datasets.Sequence(datasets.Value("int32")) for name in columns})
    datasets.Dataset.from_dict(content, features=features).save_to_disk(str(path))
    if fingerprint is not None:
        prepared = {"tokenizer_fingerprint": fingerprint, "vocab_size": 123}
        (path / "prepared.json").write_text(json.dumps(prepared))
    return path


def assert_same_row(found: Row, expected: Row) -> None:
    for name in ("input_ids", "labels", "document_lengths"):
        assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory: pytest.TempPathFactory, llama2_tokenizer_dir: Path, root: Path) -> Path:
    """What the real script makes of 300 records: three bins of rows of at most 64 tokens."""
    directory = tmp_path_factory.mktemp("prepared")
    (directory / "in").mkdir()
    with open(directory / "in" / "x.jsonl", "w", encoding="utf-8") as file:
        for text in sample_texts(300, seed=9):
            record = {"source": text[:9], "target": text, "category": "c"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    subprocess.run(
        [
            *(sys.executable, str(root / "prepare_pretrain_dataset.py")),
            *("--data_input_dirs", str(directory / "in"), "--tokenizer_dir", str(llama2_tokenizer_dir)),
            *("--data_output_dirs", str(directory / "out"), "--max_length", "64"),
            *("--num_spliced_dataset_bins", "3", "--num_workers", "1"),
        ],
        check=True,
        capture_output=True,
    )
    return directory / "out"


def test_more_parts_than_may_be_open(prepared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = find_part_directories([prepared_dir / "arrow"]) * 3
    everything = PreparedDataset(parts, 64, True)
    expected = [everything[row].input_ids.tolist() for row in range(len(everything))]
    monkeypatch.setattr(prepared_rows, "MAX_OPEN_PARTS", 2)
    source = PreparedDataset(parts, 64, True)
    assert source.fingerprint == everything.fingerprint
    for row in [*range(len(source)), *reversed(range(len(source)))]:
        assert source[row].input_ids.tolist() == expected[row]
        assert len(source._open_tables) <= 2


def test_bins_of_the_real_script(prepared_dir: Path, llama2_tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint

    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    parts = find_part_directories([prepared_dir / "arrow"])
    assert [part.name for part in parts] == ["part-00000", "part-00001", "part-00002"]
    source = PreparedDataset(parts, 64, True, tokenizer_fingerprint(tokenizer))
    lines = [
        json.loads(line)
        for part in parts
        for line in (prepared_dir / "jsonl" / f"{part.name}.jsonl").read_text().splitlines()
    ]
    assert len(source) == len(lines) > 10
    for index, line in enumerate(lines):
        assert_same_row(source[index], Row(*(np.array(line[name]) for name in line)))
    assert source.num_tokens == sum(len(line["input_ids"]) for line in lines)
    assert [ranges[0][0] for ranges in source.bucket_ranges] == source.starts[:-1].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_brings_the_batches_of_the_sampler(prepared_dir: Path, num_workers: int) -> None:
    source = PreparedDataset(find_part_directories([prepared_dir / "arrow"]), 64, True)
    order = RowOrder(source, seed=1, bucketed=False)
    sampler = StepSampler(order, BatchShape(2, 2, 1, 0), epoch=0, position=4, num_epochs=1)
    collator = Collator(source, 0, 64, True, vocab_size=500)
    batches = list(make_loader(source, sampler, collator, num_workers, pin_memory=False))
    assert [batch["row_index"].tolist() for batch in batches] == list(sampler)
    for batch in batches[:3]:
        assert torch.equal(batch["input_ids"], collator(batch["row_index"].tolist())["input_ids"])


def test_parts_are_laid_end_to_end_and_make_buckets(tmp_path: Path) -> None:
    rows = [make_row([[number, number]]) for number in range(10)]
    parts = [
        write_part(tmp_path / "a" / "part-00000", rows[:2]),
        write_part(tmp_path / "a" / "part-00001", rows[2:5]),
        write_part(tmp_path / "b" / "part-00000", rows[5:9]),
        write_part(tmp_path / "b" / "part-00001", rows[9:]),
    ]
    assert find_part_directories([tmp_path / "a", parts[2], parts[3]]) == parts
    source = PreparedDataset(parts, 4, True)
    for number, row in enumerate(rows):
        assert_same_row(source[number], row)
    assert source.bucket_ranges == [[(0, 2), (5, 9)], [(2, 5), (9, 10)]]
    assert source.describe_row(7) == f"{parts[2]} row 2"
    order = RowOrder(source, 0, bucketed=True).permutation(0).tolist()
    assert sorted(order[:6]) == [0, 1, 5, 6, 7, 8]


def test_a_set_is_a_directory_of_parts_in_order_of_first_mention(tmp_path: Path) -> None:
    rows = [make_row([list(range(number + 1))]) for number in range(10)]
    sizes = {"zh/arrow/part-00001": 3, "en/arrow/part-00000": 2, "zh/arrow/part-00000": 4, "code/part-0": 1}
    parts, filled = [], 0
    for name, size in sizes.items():
        parts.append(write_part(tmp_path / name, rows[filled : filled + size]))
        filled += size
    source = PreparedDataset(parts, 16, True)
    assert [(each.name, each.num_rows) for each in source.sets] == [("zh", 7), ("en", 2), ("code", 1)]
    assert [each.bins for each in source.sets] == [[[(5, 9)], [(0, 3)]], [[(3, 5)]], [[(9, 10)]]]
    assert [each.num_tokens for each in source.sets] == [1 + 2 + 3 + 6 + 7 + 8 + 9, 4 + 5, 10]
    assert source.row_lengths().tolist() == list(range(1, 11))
    assert source.row_lengths().dtype == np.uint16
    assert source.sets_of(np.arange(10)).tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 0, 2]
    # Another way to write the same directory, and a link to a part, make no further set.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "part-00007").symlink_to(parts[1])
    linked = PreparedDataset([parts[0], tmp_path / "en" / ".." / "zh" / "arrow" / "part-00000"], 16, True)
    assert [each.name for each in linked.sets] == ["zh"]
    moved = PreparedDataset([parts[0], tmp_path / "more" / "part-00007"], 16, True)
    assert [each.name for each in moved.sets] == ["zh", "more"]


def test_fingerprint_changes_with_rows_their_number_and_order(tmp_path: Path) -> None:
    rows = [make_row([[number, number + 1]]) for number in range(5)]
    variants = [rows, rows[:4], rows[::-1], [make_row([[9, 9]]), *rows[1:]]]
    parts = [write_part(tmp_path / str(number), variant) for number, variant in enumerate(variants)]
    prints = [PreparedDataset([part], 4, True).fingerprint for part in parts]
    assert len(set(prints)) == 4
    assert prints[0] == PreparedDataset([parts[0]], 4, True).fingerprint
    both = [PreparedDataset(pair, 4, True).fingerprint for pair in (parts[:2], parts[1::-1])]
    assert both[0] != both[1]


def test_fingerprint_knows_every_row_of_prepared_bins(prepared_dir: Path, tmp_path: Path) -> None:
    """One label in the middle of a bin: the same records cut elsewhere between source and target."""
    part = prepared_dir / "arrow" / "part-00000"
    rows = [PreparedDataset([part], 64, True)[row] for row in range(5)]
    prints = []
    for number, label in enumerate((IGNORED, 7)):
        rows[1].labels = rows[1].labels.copy()
        rows[1].labels[3] = label
        changed = write_part(tmp_path / f"part-0000{number}", rows, fingerprint="of the tokenizer")
        prints.append(PreparedDataset([changed], 64, True).fingerprint)
    assert prints[0] != prints[1]


@pytest.mark.parametrize("shuffled", [False, True])
def test_bins_of_the_original_need_isolation_off(tmp_path: Path, shuffled: bool) -> None:
    """int64 rows without document_lengths; a shuffled set carries an index table until it is saved."""
    content = {
        "input_ids": [[1, 2, 3], [4], [5, 6]],
        "labels": [[IGNORED, 2, 3], [4], [5, IGNORED]],
        "seq_length": [3, 1, 2],
        "seq_category": ["a", "b", "c"],
    }
    original = datasets.Dataset.from_dict(content)
    if shuffled:
        original = original.select([2, 0, 1])
        assert original._indices is not None
    original.save_to_disk(str(tmp_path / "part-00000"))
    parts = find_part_directories([tmp_path])
    with pytest.raises(UserError, match=r"part-00000: has no document_lengths.*--no-isolate_documents"):
        PreparedDataset(parts, 8, need_documents=True)
    source = PreparedDataset(parts, 8, need_documents=False)
    for index, number in enumerate([2, 0, 1] if shuffled else [0, 1, 2]):
        assert source[index].input_ids.tolist() == content["input_ids"][number]
        assert source[index].labels.tolist() == content["labels"][number]
        assert source[index].document_lengths.tolist() == [content["seq_length"][number]]
    assert Collator(source, 0, 8, False, 10)([0, 1, 2])["problem"] is None


def test_all_problems_with_parts_are_reported_together(tmp_path: Path) -> None:
    rows = [make_row([[1, 2]]), make_row([[1, 2, 3, 4, 5]])]
    long_rows = write_part(tmp_path / "long", rows)
    other = write_part(tmp_path / "other", rows[:1], fingerprint="their own")
    same = write_part(tmp_path / "same", rows[:1], fingerprint="ours")
    with pytest.raises(UserError) as caught:
        PreparedDataset([long_rows, other, same], 4, True, tokenizer_fingerprint="ours")
    first, second = caught.value.problems
    assert f"{long_rows}: row 1 has 5 tokens" in first
    assert "--max_length 4" in first
    assert f"{other}: was prepared with another tokenizer" in second
    assert "their own" in second
    assert "--tokenizer_dir" in second


def test_a_part_given_twice_is_refused(tmp_path: Path) -> None:
    part = write_part(tmp_path / "arrow" / "part-00000", [make_row([[1, 2]])])
    (tmp_path / "link").symlink_to(tmp_path / "arrow")
    for again in (part, tmp_path / "arrow", tmp_path / "link" / "part-00000"):
        with pytest.raises(UserError, match="part-00000: given twice; its rows would count twice"):
            find_part_directories([tmp_path / "arrow", again])


def test_parts_that_cannot_be_read_are_named_together(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "part-00000"))
    broken = write_part(tmp_path / "part-00001", [make_row([[1]])])
    arrow_file = next(broken.glob("*.arrow"))
    arrow_file.write_bytes(arrow_file.read_bytes()[:50])
    with pytest.raises(UserError) as caught:
        PreparedDataset(find_part_directories([tmp_path]), 4, True)
    first, second = caught.value.problems
    assert "part-00000: has no column input_ids, labels" in first
    assert "part-00001: cannot be read" in second


def test_an_empty_part_is_taken_beside_a_full_one_and_refused_alone(tmp_path: Path) -> None:
    empty = write_part(tmp_path / "part-00000", [make_row([[1, 2]])])
    file = next(empty.glob("*.arrow"))
    schema = pa.ipc.open_stream(file.read_bytes()).schema
    with pa.ipc.new_stream(str(file), schema):
        pass
    full = write_part(tmp_path / "part-00001", [make_row([[3, 4]])])
    source = PreparedDataset([empty, full], 4, True)
    assert len(source) == 1
    assert source[0].input_ids.tolist() == [3, 4]
    assert RowOrder(source, 0, bucketed=True).permutation(0).tolist() == [0]
    with pytest.raises(UserError, match="no rows"):
        PreparedDataset([empty], 4, True)


def test_parts_that_datasets_saved_without_rows_or_without_tokens(tmp_path: Path) -> None:
    full = write_part(tmp_path / "part-00000", [make_row([[3, 4]])])
    rows = datasets.Dataset.from_dict({"input_ids": [[1], None, [1]], "labels": [[1], [1], None]})
    for number, kept in ((1, []), (2, [0, 1]), (3, [2, 0])):
        rows.select(kept).save_to_disk(str(tmp_path / f"part-0000{number}"))
    assert len(PreparedDataset([full, tmp_path / "part-00001"], 4, True)) == 1
    with pytest.raises(UserError, match="--eval_dataset: the given parts hold no rows"):
        PreparedDataset([tmp_path / "part-00001"], 4, True, flag="--eval_dataset")
    for number, missing in ((2, "input_ids"), (3, "labels")):
        with pytest.raises(UserError, match=f"part-0000{number}: has rows without {missing}"):
            PreparedDataset([full, tmp_path / f"part-0000{number}"], 4, False)


def test_missing_and_wrong_directories_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        find_part_directories([tmp_path / "none", tmp_path / "empty"])
    first, second = caught.value.problems
    assert f"{tmp_path / 'none'}: no such directory" in first
    assert f"{tmp_path / 'empty'}: neither a part directory" in second


def test_a_half_written_part_is_not_taken(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000", [make_row([[1]])])
    shutil.copytree(part, tmp_path / ".part-00001.tmp")
    assert find_part_directories([tmp_path]) == [part]


# Random rows


def test_random_rows_are_full_and_the_same_for_the_same_seed() -> None:
    source, again = RandomRows(5, 16, 50, seed=1), RandomRows(5, 16, 50, seed=1)
    for index in range(5):
        assert_same_row(source[index], again[index])
        assert source[index].document_lengths.tolist() == [16]
        assert 0 <= source[index].input_ids.min() <= source[index].input_ids.max() < 50
    assert source[0].input_ids.tolist() != source[1].input_ids.tolist()
    assert Collator(source, 0, 16, True, 50)([0, 4])["problem"] is None


def test_rows_with_more_tokens_than_labels_are_named(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1]]})
    rows.save_to_disk(str(tmp_path / "part-00000"))
    with pytest.raises(UserError, match="part-00000: row 1 has not as many labels as input_ids"):
        PreparedDataset([tmp_path / "part-00000"], 4, need_documents=False)


@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(-1, 6), max_size=3), st.lists(st.integers(0, 3), max_size=2)),
        min_size=1,
    ),
    st.booleans(),
)
def test_a_scan_of_all_rows_finds_what_the_collator_would(
    tmp_path_factory: pytest.TempPathFactory, contents: list[tuple[list[int], list[int]]], isolate: bool
) -> None:
    rows = [make_row([tokens]) for tokens, _ in contents]
    for row, (_, lengths) in zip(rows, contents, strict=True):
        row.document_lengths = np.array(lengths, dtype=np.int32)
    path = tmp_path_factory.mktemp("rows") / "part-00000"
    source = PreparedDataset([write_part(path, rows)], 10, isolate)
    collator = Collator(source, 0, None, isolate, vocab_size=6, multiple_of=1)
    problems = [collator([number])["problem"] for number in range(len(rows))]
    assert source.find_bad_row(6, isolate) == next((p for p in problems if p is not None), None)


def test_damaged_json_of_a_part_is_named(tmp_path: Path) -> None:
    part = write_part(tmp_path / "part-00000", [make_row([[1, 2]])])
    for name, fingerprint in (("prepared.json", "x"), ("state.json", None)):
        (part / name).write_text("[]")
        with pytest.raises(
            UserError, match=rf"--dataset {part}/{name}: not a JSON object but an array; prepare"
        ):
            PreparedDataset([part], 10, True, fingerprint)


def test_rows_without_document_lengths_are_reported(tmp_path: Path) -> None:
    rows = {"input_ids": [[1], [2]], "labels": [[1], [2]], "document_lengths": [[1], None]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "part-00000"))
    with pytest.raises(UserError, match="has rows without document_lengths"):
        PreparedDataset([tmp_path / "part-00000"], 10, True)
