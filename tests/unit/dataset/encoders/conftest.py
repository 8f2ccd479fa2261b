"""Tokenizers of both LLaMA versions, and encoders with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encoder_cases import MakeEncoder
from transformers import AutoTokenizer

from colossal_llama.conversation import colossal
from colossal_llama.conversation.stretches import follow_special_tokens
from colossal_llama.dataset.encoders.base import EncoderSpec
from colossal_llama.dataset.encoders.conversation import ConversationEncoder
from colossal_llama.dataset.encoders.pretraining import PretrainEncoder
from colossal_llama.dataset.settings import SftSettings


@pytest.fixture(scope="module", params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path):
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


@pytest.fixture(scope="module")
def make_encoder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")

    def make(
        kind: str = "pretrain",
        max_length: int = 4096,
        long_documents: str = "chunk",
        template: str = "colossal",
    ) -> Any:
        if kind == "pretrain":
            ids = tokenizer.bos_token_id, tokenizer.eos_token_id
            return PretrainEncoder(EncoderSpec(kind, *ids, max_length, str(path), long_documents))
        settings = SftSettings(colossal.find_llama_version(tokenizer), template)
        spec = ConversationEncoder.make_spec(tokenizer, settings, max_length)
        within = path.with_name("within.json")
        within.write_text(follow_special_tokens(path.read_text(encoding="utf-8")), encoding="utf-8")
        return ConversationEncoder(replace(spec, tokenizer_json=str(within)))

    return make
