"""calibrate_output.py and measure_init.py: what they write, and what they measure, against transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import EMBEDDINGS, change_source, read_weights, run

from colossal_llama.model import calibrate_output, measure_init
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


def test_every_start_is_what_the_scripts_make(
    tiny_model_dir: Path,
    tmp_path: Path,
    corpus: Path,
    extend_tokenizer: Callable,
    extend_model: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The table against models that were written, loaded by transformers."""
    tokenizer = extend_tokenizer(tiny_model_dir)
    run(
        measure_init,
        monkeypatch,
        source_model_and_tokenizer_path=tiny_model_dir,
        target_tokenizer_path=tokenizer,
        data_input_dirs=corpus,
        held_out=corpus,
        output_dir=tmp_path / "measured",
        device="cpu",
        init_input="mean,last",
        init_output="mean,half",
    )
    content = json.loads((tmp_path / "measured" / "initializations.json").read_text())
    assert content["base"]["corpus"] == pytest.approx(bits_per_byte(tiny_model_dir, TEXTS), abs=1e-4)
    results = {
        (start["init_input"], start["init_output"], start["calibrated"]): start["bits_per_byte"]["corpus"]
        for start in content["results"]
    }
    assert len(results) == 8
    extend_model(tiny_model_dir, tokenizer, tmp_path / "plain", init_input="last", init_output="half")
    assert results["last", "half", False] == pytest.approx(bits_per_byte(tmp_path / "plain", TEXTS), abs=1e-4)
    run(
        calibrate_output,
        monkeypatch,
        source_model_and_tokenizer_path=tiny_model_dir,
        target_tokenizer_path=tokenizer,
        data_input_dirs=corpus,
        target_model_path=tmp_path / "calibrated",
        init_input="last",
        init_output="half",
        device="cpu",
    )
    assert results["last", "half", True] == pytest.approx(
        bits_per_byte(tmp_path / "calibrated", TEXTS), abs=1e-4
    )
    best = min(results, key=results.__getitem__)
    text = (tmp_path / "measured" / "initializations.md").read_text()
    assert f"--init_input {best[0]} --init_output {best[1]}" in text


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
