"""Learned pieces are all reachable in the extended tokenizer; the comparison counts what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from corpus import sample_texts
from tokenizer_cases import load_fast, run_extension

from colossal_llama.tokenizer import compare_tokenizers, learn_pieces
from colossal_llama.tokenizer.corpus_texts import read_samples
from colossal_llama.tokenizer.learn_pieces import CHARACTER_FILTERS, read_stretches, sample
from colossal_llama.utils.errors import UserError


def write_records(directory: Path, records: list[Any]) -> Path:
    directory.mkdir(exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (directory / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = sample_texts(120, seed=3)
    pretrain = [{"source": "", "target": text, "category": "x"} for text in texts[:80]]
    sft = [{"messages": [{"from": "human", "content": text}]} for text in texts[80:]]
    return write_records(tmp_path / "corpus", [*pretrain, *sft])


def learn(
    monkeypatch: pytest.MonkeyPatch, output: Path, corpus: Path, source: Path, **flags: Any
) -> list[str]:
    flags = {"data_input_dirs": corpus, "source_tokenizer_dir": source, "output_file": output, **flags}
    monkeypatch.setattr("sys.argv", ["learn_pieces.py", *(f"--{k}={v}" for k, v in flags.items())])
    learn_pieces.main()
    return [json.loads(line)["piece"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["llama2_tokenizer_dir", "llama3_tokenizer_dir"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("character_filter", ["cjk", "han", "all"])
def test_every_learned_piece_is_reachable(
    source: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, character_filter: str
) -> None:
    pieces = learn(
        monkeypatch,
        tmp_path / "pieces.jsonl",
        corpus,
        source,
        num_tokens=150,
        character_filter=character_filter,
    )
    assert len(pieces) == len(set(pieces)) == 150
    assert any(len(piece) > 1 for piece in pieces)
    report = run_extension(source, tmp_path / "target", pieces, "error")
    counts = report["counts"]
    assert counts["pieces_added"] == 150
    assert counts["pieces_present_already"] == counts["missing_characters_added"] == 0
    old, new = load_fast(source), load_fast(tmp_path / "target")
    texts = list(read_samples([corpus]))
    assert sum(map(len, new(texts).input_ids)) < 0.8 * sum(map(len, old(texts).input_ids))
    used = {token_id for ids in new(texts).input_ids for token_id in ids}
    assert len(used & set(range(len(old), len(old) + 150))) > 100


def test_learning_is_repeatable(
    llama2_tokenizer_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [
        learn(
            monkeypatch,
            tmp_path / f"{i}.jsonl",
            corpus,
            llama2_tokenizer_dir,
            num_tokens=60,
            max_stretches=90,
        )
        for i in range(2)
    ]
    assert runs[0] == runs[1]


def test_fewer_pieces_than_asked_for_are_written_and_said(
    llama2_tokenizer_dir: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pieces = learn(monkeypatch, tmp_path / "p.jsonl", corpus, llama2_tokenizer_dir, num_tokens=5000)
    assert f"--num_tokens 5000: only {len(pieces):,} pieces could be learned" in capsys.readouterr().err
    run_extension(llama2_tokenizer_dir, tmp_path / "target", pieces, "error")


def test_nothing_to_learn(
    llama2_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_records(tmp_path / "corpus", [{"source": "", "target": "no Chinese"}])
    with pytest.raises(UserError, match="no such characters"):
        learn(monkeypatch, tmp_path / "p.jsonl", corpus, llama2_tokenizer_dir, num_tokens=5)
    assert not (tmp_path / "p.jsonl").exists()


def test_bad_records_are_named(tmp_path: Path) -> None:
    corpus = write_records(
        tmp_path / "corpus", [{"source": "", "target": "x"}, {"target": "x"}, {"messages": 7}, [1]]
    )
    with pytest.raises(UserError) as caught:
        list(read_samples([corpus]))
    assert [problem.split(": ")[0].rsplit(":", 1)[1] for problem in caught.value.problems] == ["2", "3", "4"]


def test_stretches_of_the_filter() -> None:
    texts = ["Hello 世界，你好！ok", "カタカナ한국어々〇"]
    assert list(read_stretches(texts, "cjk")) == ["世界", "你好", "カタカナ한국어々〇"]
    assert list(read_stretches(texts, "han")) == ["世界", "你好", "々〇"]
    assert list(read_stretches(["a\n\nb c"], "all")) == ["a", "b c"]
    assert [len(s) for s in read_stretches(["好" * 2500], "cjk")] == [1000, 1000, 500]
    assert set(CHARACTER_FILTERS) == {"cjk", "han", "all"}


def test_sample_is_fair_and_seeded() -> None:
    items = [str(number) for number in range(1000)]
    assert sample(items, 2000, seed=0) == items
    drawn = sample(items, 100, seed=0)
    assert len(set(drawn)) == 100
    assert drawn == sample(items, 100, seed=0) != sample(items, 100, seed=1)
    assert 350 < sum(map(int, drawn)) / 100 < 650


def test_comparison(
    llama2_tokenizer_dir: Path,
    llama3_tokenizer_dir: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directories = [llama2_tokenizer_dir, llama3_tokenizer_dir]
    flags = [f"--tokenizer_dirs={directories[0]},{directories[1]}", f"--data_input_dirs={corpus}"]
    monkeypatch.setattr(
        "sys.argv", ["compare_tokenizers.py", *flags, f"--output_file={tmp_path / 'table.json'}"]
    )
    compare_tokenizers.main()
    table = json.loads((tmp_path / "table.json").read_text())
    texts = list(read_samples([corpus]))
    for directory, row in zip(directories, table, strict=True):
        tokenizer = load_fast(directory)
        tokens = sum(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
        assert row["vocabulary_size"] == len(tokenizer)
        assert row["compression_rate"] == pytest.approx(tokens / sum(map(len, texts)))
        assert row["mean_tokens_per_sample"] == pytest.approx(tokens / len(texts))
    output = capsys.readouterr().out
    assert "Compression rate" in output
    assert f"{table[0]['compression_rate']:.3f}" in output


def test_the_bill_of_an_extension(
    source: Path,
    corpus: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, output = tmp_path / "target", tmp_path / "table.json"
    pieces = learn(monkeypatch, tmp_path / "pieces.jsonl", corpus, source, num_tokens=150)
    report = run_extension(source, target, pieces)
    flags = {
        "tokenizer_dirs": f"{source},{target}",
        "data_input_dirs": corpus,
        "model": tiny_model_dir,
        "output_file": output,
    }
    monkeypatch.setattr("sys.argv", ["x", *(f"--{name}={value}" for name, value in flags.items())])
    for _ in range(2):  # its own output is replaced
        compare_tokenizers.main()
    base_row, row = json.loads(output.read_text())
    assert base_row["extension"] is None
    bill = row["extension"]
    texts = list(read_samples([corpus]))
    base, extended = load_fast(source), load_fast(target)
    ids = [i for text in texts for i in extended(text, add_special_tokens=False).input_ids]
    assert bill["tokens"] == len(ids)
    assert bill["base_tokens"] == sum(len(base(text, add_special_tokens=False).input_ids) for text in texts)
    assert bill["occurrences"] == sum(i >= len(base) for i in ids) > 0
    assert bill["new_pieces"] == len(extended) - len(base) >= report["counts"]["pieces_added"]
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert bill["parameters"] - bill["base_parameters"] == 2 * config["hidden_size"] * bill["new_pieces"]
    assert "paid for" in capsys.readouterr().out


def test_directory_without_tokenizer(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", f"--tokenizer_dirs={corpus}", f"--data_input_dirs={corpus}"])
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        compare_tokenizers.main()


def test_plain_texts_are_read_as_they_are(tmp_path: Path) -> None:
    """As `prepare_pretrain_dataset.py --text_field` takes them; other names of the field have to be given."""
    (tmp_path / "a.jsonl").write_text('{"text": "one", "story": "two"}\n')
    assert list(read_samples([tmp_path])) == ["one"]
    assert list(read_samples([tmp_path], "story")) == ["two"]
    with pytest.raises(UserError, match=r"a\.jsonl:1: 'body' is missing"):
        list(read_samples([tmp_path], "body"))
