"""Tokenizers of both LLaMA versions, and encoders with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from encoder_cases import MakeEncoder
from transformers import AutoTokenizer

from colossal_llama.conversation import colossal
from colossal_llama.dataset.encoders.base import EncoderSpec
from colossal_llama.dataset.encoders.conversation import ConversationEncoder
from colossal_llama.dataset.encoders.pretraining import PretrainEncoder


@pytest.fixture(scope="module", params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path):
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


@pytest.fixture(scope="module")
def make_encoder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")

    def make(kind: str = "pretrain", max_length: int = 4096, long_documents: str = "chunk") -> Any:
        version = colossal.find_llama_version(tokenizer)
        end_id = colossal.find_end_of_turn(tokenizer, version) if kind == "sft" else tokenizer.eos_token_id
        spec = EncoderSpec(kind, tokenizer.bos_token_id, end_id, max_length, str(path), long_documents)
        return (PretrainEncoder if kind == "pretrain" else ConversationEncoder)(spec)

    return make
