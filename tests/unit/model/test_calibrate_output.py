"""calibrate_output.py and measure_init.py: what they write, and what they measure, against transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import EMBEDDINGS, change_source, read_weights, run

from colossal_llama.model import calibrate_output, measure_init
from colossal_llama.tokenizer import init_tokenizer
from colossal_llama.utils.errors import UserError

TEXTS = [
    "人工智能改变了图书馆。The moon is made of 人工 light.",
    "The library of the moon: 图书馆 and 人工智能, é!",
    "人工 人工 人工智能 in the long night of the moon",
    "A text of plain English words, and nothing else in it.",
]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    directory = tmp_path / "corpus"
    directory.mkdir()
    lines = [json.dumps({"source": "", "target": text, "category": "a"}) + "\n" for text in TEXTS * 6]
    (directory / "a.jsonl").write_text("".join(lines))
    return directory


def bits_per_byte(model_dir: Path, texts: list[str]) -> float:
    """With transformers alone: a document after the other, BOS before and EOS behind it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32)
    loss = 0.0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
        ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    return loss / (math.log(2) * sum(len(text.encode()) for text in texts))


@pytest.mark.parametrize(
    "shape",
    [{}, {"tied": True, "num_shards": 2}, {"extra_rows": 100, "num_shards": 3}, {"bin": True}],
    ids=str,
)
@pytest.mark.parametrize("start", ["base", "extended"])
def test_only_new_output_rows_differ(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, Any],
    start: str,
) -> None:
    source = change_source(tiny_model_dir, tmp_path / "source", **shape)
    tokenizer = extend_tokenizer(source)
    plain = extend_model(source, tokenizer, tmp_path / "plain")
    flags = {"source_model_and_tokenizer_path": tmp_path / "plain"}
    if start == "base":
        flags = {"source_model_and_tokenizer_path": source, "target_tokenizer_path": tokenizer}
    run(
        calibrate_output,
        monkeypatch,
        **flags,
        data_input_dirs=corpus,
        target_model_path=tmp_path / "target",
        held_out=corpus,
        device="cpu",
    )
    found = read_weights(tmp_path / "target")
    assert found.keys() == plain.keys()
    heads = EMBEDDINGS[:1] if shape.get("tied") else EMBEDDINGS[1:]
    report = json.loads((tokenizer / "vocabulary_extension.json").read_text())["counts"]
    new = range(report["source_vocabulary_size"], report["target_vocabulary_size"])
    for name, tensor in found.items():
        if name not in heads:
            assert torch.equal(tensor, plain[name]), name
            continue
        assert torch.equal(tensor[: new.start], plain[name][: new.start])
        assert torch.equal(tensor[new.stop :], plain[name][new.stop :])
        moved = (tensor - plain[name])[new.start : new.stop]
        # All moves are multiples of one direction.
        directions = torch.nn.functional.normalize(moved, dim=1)
        assert float((directions @ directions[0]).abs().min()) > 0.999
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config == json.loads((tmp_path / "plain" / "config.json").read_text())
    for path in (tmp_path / "plain").iterdir():
        if path.suffix in (".json", ".model") and path.name != "model_initialization.json":
            assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes(), path.name
    told = json.loads((tmp_path / "target" / "output_calibration.json").read_text())
    assert told["bits_per_byte"]["corpus"]["before"] == pytest.approx(
        bits_per_byte(tmp_path / "plain", TEXTS), abs=1e-4
    )
    assert told["bits_per_byte"]["corpus"]["after"] == pytest.approx(
        bits_per_byte(tmp_path / "target", TEXTS), abs=1e-4
    )
    shares = told["share_of_new_tokens"]
    assert shares["reached"] == pytest.approx(shares["expected"], rel=0.1)
    assert told["bits_per_byte"]["corpus"]["after"] < told["bits_per_byte"]["corpus"]["before"]


@pytest.mark.parametrize("tied", [False, True])
def test_every_start_is_what_the_scripts_make(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tied: bool,
) -> None:
    """The table against models that were written, loaded by transformers."""
    source = change_source(tiny_model_dir, tmp_path / "the base", tied=tied, num_shards=2, extra_rows=3)
    tokenizer = extend_tokenizer(source)
    run(
        measure_init,
        monkeypatch,
        source_model_and_tokenizer_path=source,
        target_tokenizer_path=tokenizer,
        data_input_dirs=corpus,
        held_out=corpus,
        output_dir=tmp_path / "measured",
        device="cpu",
        init_input="mean,last",
        init_output="mean,last",
    )
    content = json.loads((tmp_path / "measured" / "initializations.json").read_text())
    assert content["base"]["corpus"] == pytest.approx(bits_per_byte(source, TEXTS), abs=1e-4)
    results = {
        (start["init_input"], start["init_output"], start["calibrated"]): start["bits_per_byte"]["corpus"]
        for start in content["results"]
    }
    assert len(results) == 8
    of_tied = [(start["init_input"], start["init_output"]) for start in content["results"] if start["tied"]]
    assert of_tied == [("mean", "mean")] * 2 * tied + [("last", "last")] * 2 * tied
    # Tied rows that are calibrated are read as well, so both are tried: apart and as one matrix.
    for number, ways in enumerate((("last", "mean"), ("last", "last"))):
        flags = dict(zip(("init_input", "init_output"), ways, strict=True))
        plain, calibrated = tmp_path / f"plain {number}", tmp_path / f"calibrated {number}"
        extend_model(source, tokenizer, plain, **flags)
        assert results[(*ways, False)] == pytest.approx(bits_per_byte(plain, TEXTS), abs=1e-4)
        run(
            calibrate_output,
            monkeypatch,
            source_model_and_tokenizer_path=source,
            target_tokenizer_path=tokenizer,
            data_input_dirs=corpus,
            target_model_path=calibrated,
            device="cpu",
            **flags,
        )
        assert results[(*ways, True)] == pytest.approx(bits_per_byte(calibrated, TEXTS), abs=1e-4)
    best = min(results, key=results.__getitem__)
    text = (tmp_path / "measured" / "initializations.md").read_text()
    assert f"--init_input {best[0]} --init_output {best[1]}" in text
    assert f"--source_model_and_tokenizer_path '{source}'" in text


def test_pieces_that_the_corpus_never_has(
    tiny_model_dir: Path,
    tmp_path: Path,
    extend_tokenizer: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their share is half an occurrence, smoothed, and so is their bias; in bf16, with rows that stay so."""
    source = change_source(tiny_model_dir, tmp_path / "source", torch.bfloat16)
    tokenizer = extend_tokenizer(source)
    rare = tmp_path / "rare"
    rare.mkdir()
    (rare / "a.jsonl").write_text(json.dumps({"source": "", "target": "人工 light " * 400}) + "\n")
    monkeypatch.setattr(calibrate_output, "NUM_LISTED_MOVES", 1000)
    run(
        calibrate_output,
        monkeypatch,
        source_model_and_tokenizer_path=source,
        target_tokenizer_path=tokenizer,
        data_input_dirs=rare,
        target_model_path=tmp_path / "target",
        device="cpu",
    )
    told = json.loads((tmp_path / "target" / "output_calibration.json").read_text())
    num_new = len(told["largest_moves"])
    assert told["never"] >= num_new - 3
    smoothed = 0.5 / (told["corpus_tokens"] + 0.5 * num_new)
    never = [piece for piece in told["largest_moves"] if piece["expected"] == pytest.approx(smoothed)]
    assert len(never) == told["never"]
    for piece in told["largest_moves"]:
        assert math.isfinite(piece["bias"])
        assert piece["reached"] == pytest.approx(piece["expected"], rel=0.05)
    weights = read_weights(tmp_path / "target")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_a_base_without_the_rows_of_an_earlier_extension(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokenizer's report counts the second extension alone; the rows of both are new to this base."""
    first = extend_tokenizer(tiny_model_dir)
    first.rename(tmp_path / "first")
    pieces, second = tmp_path / "more.jsonl", tmp_path / "second"
    pieces.write_text(json.dumps({"piece": "改变了"}) + "\n")
    run(
        init_tokenizer,
        monkeypatch,
        source_tokenizer_dir=tmp_path / "first",
        target_tokenizer_dir=second,
        expand_tokens_file=pieces,
    )
    run(
        calibrate_output,
        monkeypatch,
        source_model_and_tokenizer_path=tiny_model_dir,
        target_tokenizer_path=second,
        data_input_dirs=corpus,
        target_model_path=tmp_path / "target",
        device="cpu",
    )
    made = json.loads((tmp_path / "target" / "model_initialization.json").read_text())
    assert made["calibrated_rows"] == made["new_rows"] > 6


def test_what_an_earlier_run_reported_goes_with_its_weights(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, target = extend_tokenizer(tiny_model_dir), tmp_path / "target"
    flags = {
        "source_model_and_tokenizer_path": tiny_model_dir,
        "target_tokenizer_path": tokenizer,
        "data_input_dirs": corpus,
        "target_model_path": target,
        "device": "cpu",
    }
    run(calibrate_output, monkeypatch, **flags)
    report = target / "output_calibration.json"
    assert report.exists()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    # Killed while it writes: nothing loads the directory, nothing says that it is calibrated.
    with monkeypatch.context() as patch:
        patch.setattr("colossal_llama.model.model_extension.write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            run(calibrate_output, patch, **flags)
    assert not (target / "config.json").exists()
    assert not report.exists()
    run(calibrate_output, monkeypatch, **flags)
    assert report.exists()
    extend_model(tiny_model_dir, tokenizer, target)
    assert not report.exists()


def test_mistakes_are_found_before_the_model_runs(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = extend_tokenizer(tiny_model_dir)
    extend_model(tiny_model_dir, tokenizer, tmp_path / "extended")
    empty, without = tmp_path / "empty", tmp_path / "without"
    for directory, text in ((empty, ""), (without, "a text of plain words")):
        directory.mkdir()
        (directory / "a.jsonl").write_text(json.dumps({"source": "", "target": text, "category": "a"}) + "\n")
    monkeypatch.setattr("colossal_llama.evaluation.hidden_states.find_hidden_states", pytest.fail)
    flags = {
        "source_model_and_tokenizer_path": tiny_model_dir,
        "target_tokenizer_path": tokenizer,
        "data_input_dirs": corpus,
        "target_model_path": tmp_path / "target",
        "device": "cpu",
    }

    def refused(match: str, **changes: object) -> None:
        with pytest.raises(UserError, match=match):
            run(calibrate_output, monkeypatch, **flags | changes)

    refused("none of the .* new pieces occurs in the .* tokens", data_input_dirs=without)
    refused("--data_input_dirs: no text in any record", data_input_dirs=empty)
    refused("--held_out .*empty: no record with a target", held_out=empty)
    refused(
        "has rows for all new pieces already",
        source_model_and_tokenizer_path=tmp_path / "extended",
        init_output="half",
    )

    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        refused("the disk has 0.00 GB free")
    (tmp_path / "target").mkdir(exist_ok=True)
    (tmp_path / "target" / "pytorch_model.bin").write_bytes(b"another model")
    refused("holds other weights", overwrite=True)
    (tmp_path / "target" / "pytorch_model.bin").unlink()

    report = tokenizer / "vocabulary_extension.json"
    content = json.loads(report.read_text())
    content["counts"]["target_vocabulary_size"] = content["counts"]["source_vocabulary_size"]
    report.write_text(json.dumps(content))
    refused("says that nothing was added")
    other = tmp_path / "other"
    shutil.copytree(tiny_model_dir, other)
    (other / "vocabulary_extension.json").write_text(
        json.dumps({"counts": {"source_vocabulary_size": 400, "target_vocabulary_size": 500}})
    )
    refused(
        "not an extension of the source's tokenizer",
        source_model_and_tokenizer_path=tmp_path / "extended",
        target_tokenizer_path=other,
    )


def test_a_model_without_new_pieces_is_refused(
    tiny_model_dir: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"vocabulary_extension\.json"):
        run(
            calibrate_output,
            monkeypatch,
            source_model_and_tokenizer_path=tiny_model_dir,
            data_input_dirs=corpus,
            target_model_path=tmp_path / "target",
        )
    assert not (tmp_path / "target").exists()
