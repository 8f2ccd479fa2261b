"""Tokenizers of every kind that puts spaces its own way."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conversation_cases import KINDS
from transformers import AutoTokenizer

sys.path.append(str(Path(__file__).resolve().parents[1] / "tokenizer"))
from tokenizer_cases import run_extension

WORDS = ["<think>", "</think>", "river!"]


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


@pytest.fixture(scope="session")
def tokenizer_dir(
    tmp_path_factory: pytest.TempPathFactory, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path
) -> Callable[[str], Path]:
    """Makes the directory of a tokenizer of a kind."""
    root = tmp_path_factory.mktemp("kinds")

    @cache
    def make(kind: str) -> Path:
        if kind == "llama2":
            return llama2_tokenizer_dir
        if kind == "llama3":
            return llama3_tokenizer_dir
        directory = root / kind.replace(" ", "-")
        if kind == "legacy":
            shutil.copytree(llama2_tokenizer_dir, directory)
            change_json(directory / "tokenizer_config.json", legacy=True)
        elif kind in ("llama2 extended", "legacy extended"):
            run_extension(make(kind.split()[0]), directory, ["人工智能", "river", "長江", "the river"])
        elif kind == "prepend":
            shutil.copytree(make("legacy extended"), directory)
            change_json(directory / "tokenizer_config.json", legacy=False)
        elif kind == "first version":
            shutil.copytree(make("llama2 extended"), directory)
            change_json(
                directory / "tokenizer.json",
                normalizer={"type": "Replace", "pattern": {"Regex": r"\A(?=[ ▁])"}, "content": "▁"},
                pre_tokenizer={
                    "type": "Metaspace",
                    "replacement": "▁",
                    "prepend_scheme": "first",
                    "split": False,
                },
            )
        else:
            source = make(kind.removesuffix(" words"))
            tokenizer = AutoTokenizer.from_pretrained(source)
            tokenizer.add_tokens(WORDS)
            tokenizer.save_pretrained(directory)
            config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
            config.pop("add_prefix_space", None)
            (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return directory

    return make


@pytest.fixture(scope="session", params=KINDS)
def any_tokenizer(request: pytest.FixtureRequest, tokenizer_dir: Callable[[str], Path]) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir(request.param))
    tokenizer.kind = request.param
    return tokenizer
