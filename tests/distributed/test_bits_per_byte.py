"""Evaluations of real runs have the bits per byte of transformers alone, and of compare_models.py."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from corpus import CHINESE, ENGLISH, sample_texts
from launch import train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    WorkerSettings,
)
from colossal_llama.evaluation import compare_models

MAX_LENGTH = 96
ONCE = [
    "--max_length",
    MAX_LENGTH,
    "--plugin",
    "ddp",
    "--mixed_precision",
    "fp32",
    "--batch_size",
    2,
    "--accumulation_steps",
    1,
]


def make_model(tokenizer: Path, directory: Path, tied: bool) -> Path:
    shutil.copytree(tokenizer, directory)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(loaded) + 3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write(directory: Path, texts: list[str], source: str = "") -> Path:
    directory.mkdir(parents=True)
    records = [{"source": source, "target": text, "category": "c"} for text in texts]
    (directory / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def prepare_set(raw: Path, model: Path, output: Path) -> Path:
    prepare(
        PreparationSettings(
            PretrainSettings(),
            PathSettings([raw], tokenizer_dir=model, data_output_dirs=output),
            RowSettings(MAX_LENGTH, 1),
            WorkerSettings(num_workers=1),
        )
    )
    return output / "arrow"


def spelled_bytes(token: str, is_special: bool) -> int:
    """Of a token in the spelling of its vocabulary: `▁the`, `<0xE4>`; or a character for each byte."""
    if is_special:
        return 0
    if token.startswith("<0x"):
        return 1
    return len(token.replace("▁", " ").encode())


def bits_by_transformers_alone(model_dir: Path, parts: Path) -> float:
    """Document by document: tokens with loss that something predicts, and the bytes of their text."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    is_byte_level = "llama3" in model_dir.name
    model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32).eval()
    nats = num_bytes = 0.0
    for part in sorted(parts.glob("part-*")):
        for row in datasets.load_from_disk(str(part)):
            start = 0
            for length in row["document_lengths"]:
                ids = row["input_ids"][start : start + length]
                labels = row["labels"][start : start + length]
                start += length
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, :-1]
                nats += float(
                    torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum")
                )
                for before, label in zip(ids[:-1], labels[1:], strict=True):
                    if label == -100:
                        continue
                    token = tokenizer.convert_ids_to_tokens(label)
                    special = label in tokenizer.all_special_ids
                    if is_byte_level:  # a character of the alphabet is a byte
                        num_bytes += 0 if special else len(token)
                    else:
                        num_bytes += spelled_bytes(token, special)
                        num_bytes -= before == tokenizer.bos_token_id and token.startswith("▁")
    return nats / math.log(2) / num_bytes


@pytest.mark.parametrize("kind", ["llama2", "llama3 tied"])
def test_an_evaluation_is_what_transformers_alone_and_the_comparison_say(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents packed into rows, chunked over rows, and with sources; before any step."""
    tokenizer = request.getfixturevalue(f"{kind.split()[0]}_tokenizer_dir")
    model = make_model(tokenizer, tmp_path / kind.replace(" ", "-"), "tied" in kind)
    sets = {
        "whole/zh": write(tmp_path / "raw" / "zh", [text for text in CHINESE if len(text) < 28]),
        "whole/en": write(tmp_path / "raw" / "en", ENGLISH),
        "chunked": write(tmp_path / "raw" / "chunked", [" ".join(ENGLISH), "".join(CHINESE)]),
        "sources": write(tmp_path / "raw" / "sources", sample_texts(8, seed=4, max_sentences=1), "Go: "),
    }
    arrows = {name: prepare_set(raw, model, tmp_path / "data" / name) for name, raw in sets.items()}
    flags = ["--pretrained", model, "--dataset", arrows["whole/en"], *ONCE, "--max_steps", 0]
    flags += ["--eval_dataset", *arrows.values(), "--eval_at_start"]
    run = train(tmp_path / "run", 2 if kind == "llama2" else 1, *flags)
    assert run.returncode == 0, run.output[-3000:]
    (record,) = run.metrics()
    assert (record["step"], record["tokens"]) == (0, 0)
    for name, arrow in arrows.items():
        expected = bits_by_transformers_alone(model, arrow)
        assert record[f"eval_bits_per_byte/{name}"] == pytest.approx(expected, rel=1e-4), name

    output = tmp_path / "comparison"
    directories = ",".join(str(sets[name]) for name in ("whole/zh", "whole/en"))
    settings = {"models": model, "data_input_dirs": directories, "output_dir": output, "dtype": "fp32"}
    monkeypatch.setattr("sys.argv", ["x", *(f"--{name}={value}" for name, value in settings.items())])
    compare_models.main()
    results = json.loads((output / "comparison.json").read_text())["results"]
    for result in results:
        if result["category"] is None:
            found = record[f"eval_bits_per_byte/whole/{result['set']}"]
            assert result["bits_per_byte"] == pytest.approx(found, rel=1e-5)
