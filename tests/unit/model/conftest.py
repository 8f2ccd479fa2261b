"""Extended tokenizers and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import WORDS, read_weights, run

from colossal_llama.model import init_model
from colossal_llama.tokenizer import init_tokenizer


@pytest.fixture
def extend_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    def extend(source: Path, unreachable: str = "add") -> Path:
        pieces, target = tmp_path / "pieces.jsonl", tmp_path / "tokenizer"
        pieces.write_text("".join(json.dumps({"piece": word}) + "\n" for word in WORDS))
        run(
            init_tokenizer,
            monkeypatch,
            source_tokenizer_dir=source,
            target_tokenizer_dir=target,
            expand_tokens_file=pieces,
            unreachable=unreachable,
        )
        return target

    return extend


@pytest.fixture
def extend_model(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, torch.Tensor]]:
    def extend(source: Path, tokenizer: Path, target: Path, **flags: Any) -> dict[str, torch.Tensor]:
        run(
            init_model,
            monkeypatch,
            source_model_and_tokenizer_path=source,
            target_tokenizer_path=tokenizer,
            target_model_path=target,
            **flags,
        )
        return read_weights(target)

    return extend
