"""Documents against a slow reference: one record at a time, the mask decided token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.dataset import conversation, tokenization
from colossal_llama.dataset.conversation import Message
from colossal_llama.dataset.jsonl import BadRecord
from colossal_llama.dataset.tokenization import (
    ConversationEncoder,
    ConversationRecord,
    EncoderSpec,
    Outcome,
    PretrainEncoder,
    PretrainRecord,
    split_signed,
)

SNIPPETS = [
    "river ",
    " The",
    "人工智能",
    "。",
    "\n",
    "  ",
    "</s>",
    "<|eot_id|>",
    "<s>",
    "é",
    "🌊",
    "x",
    "1,250",
    "▁",
    "\u200b",
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=8).map("".join)
no_surrogates = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
MakeEncoder = Callable[..., Any]


@pytest.fixture(scope="module", params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path):
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


@pytest.fixture(scope="module")
def make_encoder(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")

    def make(kind: str = "pretrain", max_length: int = 4096, truncate: bool = False) -> Any:
        version = conversation.find_llama_version(tokenizer)
        end_id = (
            conversation.find_end_of_turn(tokenizer, version) if kind == "sft" else tokenizer.eos_token_id
        )
        spec = EncoderSpec(kind, tokenizer.bos_token_id, end_id, max_length, truncate, str(path))
        return (PretrainEncoder if kind == "pretrain" else ConversationEncoder)(spec)

    return make


def encode_slowly(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return encoding["input_ids"], encoding["offset_mapping"]


def reference_document(tokenizer, source: str, target: str) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a pre-training record, as the specification words it."""
    ids, offsets = encode_slowly(tokenizer, source + target)
    input_ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    if not source:
        return input_ids, list(input_ids)
    has_loss = [False, *(end > len(source) for _, end in offsets), True]
    return input_ids, [i if loss else -100 for i, loss in zip(input_ids, has_loss, strict=True)]


def joined(outcome: Outcome) -> tuple[list[int], list[int]]:
    input_ids, labels = split_signed(np.concatenate(outcome.pieces))
    return input_ids.tolist(), labels.tolist()


def check_accounts(outcome: Outcome) -> None:
    num_kept = sum(len(piece) for piece in outcome.pieces)
    assert outcome.num_tokens == num_kept + sum(outcome.dropped_tokens.values())
    assert bool(outcome.pieces) == (outcome.reason is None)


def test_split_signed() -> None:
    input_ids, labels = split_signed(np.array([~1, ~0, 0, 7], dtype=np.int32))
    assert input_ids.tolist() == [1, 0, 0, 7]
    assert labels.tolist() == [-100, -100, 0, 7]
    assert input_ids.dtype == labels.dtype == np.int32


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(no_surrogates, no_surrogates), min_size=1, max_size=6))
def test_documents_equal_the_slow_reference(tokenizer, make_encoder: MakeEncoder, pairs: list) -> None:
    records = [PretrainRecord(source, target, "c") for source, target in pairs]
    for record, outcome in zip(records, make_encoder().encode(records), strict=True):
        check_accounts(outcome)
        input_ids, labels = reference_document(tokenizer, record.source, record.target)
        assert outcome.num_tokens == len(input_ids)
        if record.target:
            assert joined(outcome) == (input_ids, labels)
        else:
            assert outcome.reason == ("empty target" if record.source else "empty record")


def test_a_token_across_the_boundary_has_loss(tokenizer, make_encoder: MakeEncoder) -> None:
    """ "th" + "e": one token holds the end of the source and the beginning of the target."""
    (outcome,) = make_encoder().encode([PretrainRecord("in th", "e river", "c")])
    input_ids, labels = joined(outcome)
    plain = encode_slowly(tokenizer, "in the river")[0]
    assert input_ids[1:-1] == plain
    first = labels.index(next(label for label in labels if label != -100))
    kept = tokenizer.decode(labels[first:-1])
    assert kept.strip() == "the river"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(source=no_surrogates, target=no_surrogates.filter(bool), max_length=st.integers(2, 40))
def test_long_documents_are_chunked(
    tokenizer, make_encoder: MakeEncoder, source: str, target: str, max_length: int
) -> None:
    (outcome,) = make_encoder(max_length=max_length).encode([PretrainRecord(source, target, "c")])
    check_accounts(outcome)
    input_ids, labels = reference_document(tokenizer, source, target)
    found = [tuple(a.tolist() for a in split_signed(piece)) for piece in outcome.pieces]
    assert all(any(label != -100 for label in labels[1:]) for _, labels in found)
    assert found[-1][0][-1] == tokenizer.eos_token_id
    if len(input_ids) % max_length != 1:
        chunks = [
            (input_ids[i : i + max_length], labels[i : i + max_length])
            for i in range(0, len(input_ids), max_length)
        ]
        assert found == [chunk for chunk in chunks if any(label != -100 for label in chunk[1])]
    assert ("chunked" in outcome.notes) == (len(input_ids) > max_length)


def chunk_by_rule(labels: list[bool], max_length: int) -> list[tuple[int, int]]:
    """Bounds of all chunks, dropped ones too: full rows, unless the next one's only label came first."""
    bounds, start = [], 0
    while start < len(labels):
        end = min(start + max_length, len(labels))
        following = labels[end : end + max_length]
        if following[:1] == [True] and not any(following[1:]):
            end = end - 1 if any(labels[start + 1 : end - 1]) else end + 1 - max_length
        bounds.append((start, end))
        start = end
    return bounds


@given(labels=st.lists(st.booleans(), min_size=1, max_size=40), max_length=st.integers(2, 9))
def test_every_chunk_has_loss(labels: list[bool], max_length: int) -> None:
    """Any mask, though those of pre-training end with a run of labels."""
    ids = np.arange(len(labels), dtype=np.int32)
    stored = np.where(labels, ids, ~ids).astype(np.int32)
    outcome = tokenization._chunk(stored, max_length)
    check_accounts(outcome)
    bounds = chunk_by_rule(labels, max_length)
    assert [i for start, end in bounds for i in range(start, end)] == ids.tolist()
    kept = [(start, end) for start, end in bounds if any(labels[start + 1 : end])]
    assert [piece.tolist() for piece in outcome.pieces] == [stored[a:b].tolist() for a, b in kept]
    for piece in outcome.pieces:
        assert len(piece) <= max_length
        assert (piece[1:] >= 0).any()


@given(num_tokens=st.integers(2, 60), num_without=st.integers(1, 59), max_length=st.integers(2, 9))
def test_only_a_remainder_of_one_token_takes_from_the_chunk_before(
    num_tokens: int, num_without: int, max_length: int
) -> None:
    """Pre-training's masks: nothing up to some token, everything after it."""
    ids = np.arange(num_tokens, dtype=np.int32)
    stored = np.where(ids < min(num_without, num_tokens - 1), ~ids, ids).astype(np.int32)
    outcome = tokenization._chunk(stored, max_length)
    sizes = [len(piece) for piece in outcome.pieces]
    assert outcome.pieces[-1][-1] == num_tokens - 1  # EOS
    if num_tokens % max_length != 1:
        assert sizes[:-1] == [max_length] * (len(sizes) - 1)
    elif max_length > 2:
        assert sizes[:-2] == [max_length] * (len(sizes) - 2)
        assert sizes[-2:] in ([max_length - 1, 2], [max_length])
        # What is lost: source that fills its rows, and a token or none of the rows with labels.
        num_dropped = sum(outcome.dropped_tokens.values())
        assert num_dropped % max_length in (0, 1)


def test_long_documents_are_truncated_when_asked(tokenizer, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(max_length=8, truncate=True)
    text = "The river carries cold water from the mountains to the sea."
    kept, without_label = encoder.encode([PretrainRecord("", text, "c"), PretrainRecord(text, "x", "c")])
    input_ids, labels = reference_document(tokenizer, "", text)
    assert joined(kept) == (input_ids[:8], labels[:8])
    assert kept.dropped_tokens == {"beyond max_length": len(input_ids) - 8}
    assert kept.notes == ["truncated"]
    assert without_label.pieces == []
    assert without_label.reason == "no label in the part kept"
    for outcome in (kept, without_label):
        check_accounts(outcome)


def test_records_are_checked(make_encoder: MakeEncoder) -> None:
    good = {"source": "", "target": "x", "category": "c", "id": 7}
    assert make_encoder().parse(good) == PretrainRecord("", "x", "c")
    for field in ("source", "target", "category"):
        with pytest.raises(BadRecord, match=f"'{field}' is missing"):
            make_encoder().parse({k: v for k, v in good.items() if k != field})
        with pytest.raises(BadRecord, match=f"'{field}' is null, not a string"):
            make_encoder().parse({**good, field: None})


# Conversations


def parse_turns(*turns: tuple[str, str]) -> ConversationRecord:
    return ConversationRecord([Message(role, content) for role, content in turns], "c")


def reference_conversation(tokenizer, messages: list[Message]) -> tuple[list[int], list[int], list[int]]:
    """(input_ids, labels, ends of the turns), segment by segment."""
    special = conversation.find_special_tokens(tokenizer, conversation.find_llama_version(tokenizer))
    input_ids: list[int] = []
    labels: list[int] = []
    ends = []
    for turn in conversation.render_turns(messages, special):
        for segment in turn:
            ids = conversation.encode_segments(tokenizer, [segment])
            input_ids += ids
            labels += ids if segment.has_loss else [-100] * len(ids)
        ends.append(len(input_ids))
    return input_ids, labels, ends


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(
    system=st.none() | no_surrogates,
    turns=st.lists(st.tuples(st.sampled_from(["human", "assistant"]), no_surrogates), max_size=5),
    max_length=st.integers(40, 400),
)
def test_conversations_equal_the_slow_reference(
    tokenizer, make_encoder: MakeEncoder, system: str | None, turns: list, max_length: int
) -> None:
    record = parse_turns(*([("system", system)] if system is not None else []), *turns)
    (outcome,) = make_encoder("sft", max_length).encode([record])
    check_accounts(outcome)
    input_ids, labels, ends = reference_conversation(tokenizer, record.messages)
    assert outcome.num_tokens == len(input_ids)
    answers = [
        end for end, (role, content) in zip(ends, turns, strict=True) if role == "assistant" and content
    ]
    fitting = [end for end in answers if end <= max_length]
    if fitting:
        assert joined(outcome) == (input_ids[: fitting[-1]], labels[: fitting[-1]])
    else:
        assert outcome.reason == ("first answer beyond max_length" if answers else "no answer")


@pytest.mark.parametrize(
    ("turns", "reason", "dropped", "notes"),
    [
        ([("human", "a"), ("assistant", "b")], None, [], []),
        ([("assistant", "a")], None, [], ["starts with the assistant"]),
        ([("human", "a")], "no answer", ["no answer"], ["ends with the human"]),
        (
            [("human", "a"), ("assistant", "b"), ("human", "c")],
            None,
            ["after the last answer"],
            ["ends with the human"],
        ),
        ([("human", "a"), ("assistant", "")], "no answer", ["no answer"], ["empty content"]),
        ([("human", ""), ("assistant", "b")], None, [], ["empty content"]),
        ([("human", "a"), ("human", "b"), ("assistant", "c")], None, [], ["same role twice"]),
        ([("system", "a")], "no answer", [], ["own system message"]),
        ([("system", "s"), ("human", "a"), ("assistant", "b")], None, [], ["own system message"]),
    ],
)
def test_odd_conversations(
    make_encoder: MakeEncoder, turns: list, reason: str | None, dropped: list[str], notes: list[str]
) -> None:
    (outcome,) = make_encoder("sft").encode([parse_turns(*turns)])
    check_accounts(outcome)
    assert outcome.reason == reason
    assert list(outcome.dropped_tokens) == dropped
    assert outcome.notes == notes


def test_an_empty_answer_is_context_without_loss(tokenizer, make_encoder: MakeEncoder) -> None:
    record = parse_turns(("human", "a"), ("assistant", ""), ("human", "b"), ("assistant", "c"))
    (outcome,) = make_encoder("sft").encode([record])
    input_ids, labels = joined(outcome)
    assert input_ids == reference_conversation(tokenizer, record.messages)[0]
    assert [label for label in labels if label != -100] == [*encode_slowly(tokenizer, "c")[0], input_ids[-1]]


def test_turns_beyond_max_length_are_counted(make_encoder: MakeEncoder, tokenizer) -> None:
    turns = [("human", "a"), ("assistant", "b"), ("human", "c"), ("assistant", "d" * 50)]
    _, _, ends = reference_conversation(tokenizer, [Message(*turn) for turn in turns])
    (outcome,) = make_encoder("sft", ends[-1] - 1).encode([parse_turns(*turns)])
    check_accounts(outcome)
    assert outcome.dropped_tokens == {"turns beyond max_length": ends[3] - ends[1]}
    assert outcome.notes == ["cut to whole turns"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "'messages' is missing"),
        ({"messages": {}}, "'messages' is an object, not an array"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["x"]}, r"messages\[0\] is a string, not an object"),
        ({"messages": [{"from": "human"}]}, r"messages\[0\]: 'content' is missing"),
        ({"messages": [{"from": "human", "content": None}]}, r"messages\[0\]: 'content' is null"),
        (
            {"messages": [{"from": "gpt", "content": "x"}]},
            r"messages\[0\]: unknown role 'gpt' \(choose from human",
        ),
        (
            {"messages": [{"from": "human", "content": "x"}, {"from": "system", "content": "x"}]},
            r"messages\[1\]: a system message has to be the first",
        ),
        ({"messages": [{"from": "human", "content": "x"}], "category": 1}, "'category' is a number"),
    ],
)
def test_conversations_are_checked(make_encoder: MakeEncoder, value: dict, message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        make_encoder("sft").parse(value)


def test_category_of_a_conversation_is_optional(make_encoder: MakeEncoder) -> None:
    value = {"messages": [{"from": "human", "content": "x"}]}
    assert make_encoder("sft").parse(value).category == "unknown"
    assert make_encoder("sft").parse({**value, "category": None}).category == "unknown"
