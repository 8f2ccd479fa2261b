"""A new template, engine or policy is a file and a line: made-up ones work, and are cached apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from colossal_llama.conversation import TEMPLATES, find_template
from colossal_llama.conversation.colossal import ColossalTemplate
from colossal_llama.conversation.form import CONTENT, Form
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.stretches import follow_special_tokens
from colossal_llama.dataset.encoders import ENCODERS, LONG_DOCUMENTS, find_encoder, find_policy, load_encoder
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.encoders.conversation import ConversationEncoder
from colossal_llama.dataset.engines import ENGINES, load_engine
from colossal_llama.dataset.engines.huggingface import TokenizersEngine
from colossal_llama.dataset.labels import split_signed
from colossal_llama.dataset.settings import SftSettings

OLD_SPECS = [
    (
        EncoderSpec("pretrain", 1, 2, 128, "/a/b.json", "truncate"),
        {"kind": "pretrain", "bos_id": 1, "end_id": 2, "max_length": 128, "truncate": True},
    ),
    (
        EncoderSpec("chat_template", 1, 2, 64, "b.json", template="x", template_tokens=(("a", "<s>"),)),
        {"kind": "chat_template", "bos_id": 1, "end_id": 2, "max_length": 64, "truncate": False}
        | {"template": "x", "template_tokens": (("a", "<s>"),)},
    ),
]


class Shouting(ColossalTemplate):
    """Ends what is said with an exclamation mark of its own."""

    @classmethod
    def describe(cls, tokenizer: Any, llama_version: int | None = None) -> Form:
        form = super().describe(tokenizer, llama_version)
        human, answer = (text.replace(CONTENT, f"{CONTENT}!") for text in (form.human, form.answer))
        return dataclasses.replace(form, name="shouting", human=human, answer=answer)


class CountingEngine(TokenizersEngine):
    num_texts = 0

    def encode(self, texts: Sequence[str]) -> Iterable[list[int]]:
        type(self).num_texts += len(texts)
        return super().encode(texts)


def keep_the_end(stored: np.ndarray, max_length: int) -> Outcome:
    num_cut = len(stored) - max_length
    return Outcome(len(stored), [stored[num_cut:]], {"before the end": num_cut})


@pytest.fixture
def tokenizer(llama2_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir)


@pytest.fixture
def tokenizer_json(tokenizer: Any, tmp_path: Path) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return str(path)


def test_every_name_is_found() -> None:
    assert all(find_template(name).of_tokenizer for name in TEMPLATES)
    assert all(find_encoder(kind).make_spec for kind in ENCODERS)
    assert all(callable(find_policy(name)) for name in LONG_DOCUMENTS)
    assert list(ENGINES) == ["hf", "tuetoken"]


def test_a_new_template(tokenizer: Any, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEMPLATES, "shouting", f"{__name__}:Shouting")
    spec = ConversationEncoder.make_spec(tokenizer, SftSettings(2, "shouting"), 512)
    Path(tokenizer_json).write_text(follow_special_tokens(Path(tokenizer_json).read_text()))
    encoder = load_encoder(dataclasses.replace(spec, tokenizer_json=tokenizer_json))
    messages = [{"from": "human", "content": "Where?"}, {"from": "assistant", "content": "Here"}]
    (outcome,) = encoder.encode([encoder.parse({"messages": messages})])
    ids, labels = split_signed(outcome.pieces[0])
    assert tokenizer.decode(labels[labels >= 0][-2:]).replace(" ", "") == "!</s>"
    prompt = find_template("shouting").of_tokenizer(tokenizer).encode_prompt([Message("human", "Where?")])
    assert prompt == ids[: len(prompt)].tolist()
    assert "shouting" in spec.as_key().values()


def test_a_new_engine(tokenizer: Any, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "counting", f"{__name__}:CountingEngine")
    spec = EncoderSpec("pretrain", 1, 2, 128, tokenizer_json)
    record = {"source": "", "target": "The river", "category": "c"}
    outcomes = []
    for engine in ("hf", "counting"):
        encoder = load_encoder(dataclasses.replace(spec, engine=engine))
        outcomes += encoder.encode([encoder.parse(record)])
    assert outcomes[0].pieces[0].tolist() == outcomes[1].pieces[0].tolist()
    assert CountingEngine.num_texts == 1
    assert dataclasses.replace(spec, engine="counting").as_key()["engine"] == "counting"


def test_an_engine_gives_the_same_ids_with_borders(tokenizer_json: str) -> None:
    engine = load_engine("hf", tokenizer_json)
    texts = ["The river </s>", "", "长江 carries"]
    encoded = list(engine.encode_with_borders(texts, [3, 1, 2]))
    assert [ids for ids, _ in encoded] == list(engine.encode(texts))
    assert [border for _, border in encoded][1] == 0


def test_a_new_policy(tokenizer_json: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LONG_DOCUMENTS, "keep_the_end", f"{__name__}:keep_the_end")
    spec = EncoderSpec("pretrain", 1, 2, 5, tokenizer_json, "keep_the_end")
    encoder = load_encoder(spec)
    record = {"source": "", "target": "The river carries cold water", "category": "c"}
    (outcome,) = encoder.encode([encoder.parse(record)])
    assert (len(outcome.pieces[0]), outcome.pieces[0][-1]) == (5, 2)
    assert spec.as_key()["long_documents"] == "keep_the_end"


@pytest.mark.parametrize(("spec", "key"), OLD_SPECS)
def test_shards_cached_by_earlier_versions_stay_valid(spec: EncoderSpec, key: dict[str, Any]) -> None:
    """What could be chosen then has the same key: only new choices add to it."""
    assert spec.as_key() == {"tokenizer_json": "b.json", "template": "", "template_tokens": (), **key}
