"""Tiny models of both kinds of tokenizers, tied or not, extended or not, and held-out text."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from corpus import CHINESE, ENGLISH
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from colossal_llama.model import init_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tokenizer"))

from tokenizer_cases import run_extension


def make_model(tokenizer: Path, directory: Path, tied: bool = False, positions: int = 4096) -> Path:
    """A LLaMA whose losses differ from token to token."""
    shutil.copytree(tokenizer, directory, dirs_exist_ok=True)
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(loaded),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=loaded.bos_token_id,
        eos_token_id=loaded.eos_token_id,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_held_out(directory: Path, records: Iterable[tuple[str, str, str]]) -> Path:
    """Pre-training records of (category, source, target)."""
    directory.mkdir(parents=True)
    lines = [
        json.dumps({"source": source, "target": target, "category": category}, ensure_ascii=False) + "\n"
        for category, source, target in records
    ]
    (directory / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def models(
    llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("compared")
    made = {
        "llama2": make_model(llama2_tokenizer_dir, root / "llama2"),
        "llama3 tied": make_model(llama3_tokenizer_dir, root / "llama3", tied=True),
    }
    run_extension(made["llama2"], root / "extended", ["人工智能", "中国", "图书馆", "长江"])
    with pytest.MonkeyPatch.context() as patch:
        flags = {
            "source_model_and_tokenizer_path": made["llama2"],
            "target_tokenizer_path": root / "extended",
            "target_model_path": root / "extended",
        }
        patch.setattr("sys.argv", ["init_model.py", *(f"--{name}={value}" for name, value in flags.items())])
        init_model.main()
    made["extended"] = root / "extended"
    return made


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sets: short documents of two categories, one with a source; and documents longer than a window."""
    root = tmp_path_factory.mktemp("held_out")
    english = [(f"c{number % 2}", "", text) for number, text in enumerate(ENGLISH)]
    return {
        "en": write_held_out(root / "en", [*english, ("c0", "Rivers. ", ENGLISH[0])]),
        "zh": write_held_out(root / "zh", [("web", "", text) for text in CHINESE]),
        "long": write_held_out(root / "long", [("web", "", " ".join(ENGLISH * 2)), ("web", "", "A")]),
    }
