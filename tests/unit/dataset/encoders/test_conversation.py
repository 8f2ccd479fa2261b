"""Conversations against a slow reference: one segment at a time, and what is cut or dropped."""

from __future__ import annotations

import pytest
from encoder_cases import MakeEncoder, check_accounts, encode_slowly, joined, no_surrogates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colossal_llama.conversation import colossal
from colossal_llama.conversation.messages import Message
from colossal_llama.corpus.records import BadRecord
from colossal_llama.dataset.encoders.conversation_records import ConversationRecord


def parse_turns(*turns: tuple[str, str]) -> ConversationRecord:
    return ConversationRecord([Message(role, content) for role, content in turns], "c")


def reference_conversation(tokenizer, messages: list[Message]) -> tuple[list[int], list[int], list[int]]:
    """(input_ids, labels, ends of the turns), each text by itself."""
    input_ids: list[int] = []
    labels: list[int] = []
    ends = []
    bos = tokenizer.bos_token_id
    end = colossal.find_end_of_turn(tokenizer, colossal.find_llama_version(tokenizer))
    opening, turns = colossal.DEFAULT_SYSTEM + "\n\n", messages
    if messages and messages[0].role == "system":
        content, turns = messages[0].content, messages[1:]
        opening = content + "\n\n" if content else ""
    for number, turn in enumerate(turns):
        header = (opening if number == 0 else "") + turn.role.capitalize() + ": "
        before = [*([bos] if number == 0 else []), *encode_slowly(tokenizer, header)[0], bos]
        said = [*encode_slowly(tokenizer, turn.content)[0], end]
        has_loss = turn.role == "assistant" and turn.content
        input_ids += before + said
        labels += [-100] * len(before) + (said if has_loss else [-100] * len(said))
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
