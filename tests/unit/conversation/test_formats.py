"""Conversations in every format are the same messages; what is none of them is said."""

from __future__ import annotations

from typing import Any

import pytest

from colossal_llama.conversation.formats import FORMATS, find_format
from colossal_llama.conversation.messages import Message
from colossal_llama.corpus.records import BadRecord
from colossal_llama.dataset.encoders.conversation_records import CONVERSATION_FIELDS, parse_conversation

TALK = [Message("system", "Be brief."), Message("human", "Hi"), Message("assistant", "Yes")]
RECORDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"from": message.role, "content": message.content} for message in TALK]},
    "openai": {
        "messages": [
            {"role": role, "content": message.content}
            for role, message in zip(("system", "user", "assistant"), TALK, strict=True)
        ]
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}],
        "system": "Be brief.",
    },
    "alpaca": {"instruction": "Hi", "input": "", "output": "Yes", "system": "Be brief."},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    record = parse_conversation({**RECORDS[name], "category": "c", "id": 1})
    assert (record.messages, record.category, record.format) == (TALK, "c", name)
    # As a table has them, with every column of every format.
    row = {field: RECORDS[name].get(field) for field in CONVERSATION_FIELDS}
    record = parse_conversation(row)
    assert (record.messages, record.category, record.format) == (TALK, "unknown", name)


def test_what_an_instruction_is_about_and_what_came_before_it() -> None:
    value = {"instruction": "Sum up.", "input": "A text.", "output": "B", "history": [["a", "b"]]}
    assert parse_conversation(value).messages == [
        Message("human", "a"),
        Message("assistant", "b"),
        Message("human", "Sum up.\n\nA text."),
        Message("assistant", "B"),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": "a"}, "'messages' is missing .*prepare_pretrain_dataset.py"),
        ({"messages": [{"role": "tool", "content": "a"}]}, r"unknown role 'tool' \(choose from user"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"from": "x"}]},
            r"messages\[1\]: 'role' is missing",
        ),
        ({"messages": [{"role": "assistant", "content": None}]}, "'content' is null, not a string"),
        ({"conversations": []}, "'conversations' is empty"),
        ({"conversations": [{"from": "bing", "value": "a"}]}, "unknown role 'bing'"),
        ({"instruction": "a", "output": 3}, "'output' is a number"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' is not an array of pairs"),
    ],
)
def test_what_can_not_be_used(value: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRecord, match=message):
        parse_conversation(value)


def test_of_two_formats_in_a_record_the_messages_count() -> None:
    assert find_format({**RECORDS["alpaca"], **RECORDS["openai"]}) == "openai"
