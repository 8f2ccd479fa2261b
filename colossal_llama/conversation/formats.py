"""The formats in which conversations come, told apart by the fields of a record.

    messages    {"messages": [{"from": "human", "content": …}, {"from": "assistant", "content": …}]}
    openai      {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}]}
    sharegpt    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}
    alpaca      {"instruction": …, "input": …, "output": …}

A new format is an entry in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from colossal_llama.conversation.messages import Message, parse_messages
from colossal_llama.corpus.records import BadRecord, take_string

SHAREGPT_ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
OPENAI_ROLES = {"user": "human", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class InputFormat:
    """`fields`: what it reads of a record. `parse` raises `BadRecord`."""

    title: str
    fields: tuple[str, ...]
    parse: Callable[[dict[str, Any]], list[Message]]


def find_format(value: Mapping[str, Any]) -> str:
    """The name of a record's format, by its fields and those of its first message; raises `BadRecord`."""
    # Rows of a table have every field, those that do not apply without a value.
    if value.get("messages") is not None:
        messages = value["messages"]
        first = messages[0] if isinstance(messages, list) and messages else None
        return "openai" if isinstance(first, dict) and "role" in first and "from" not in first else "messages"
    if value.get("conversations") is not None:
        return "sharegpt"
    if value.get("instruction") is not None and value.get("output") is not None:
        return "alpaca"
    if "messages" not in value:
        remedy = "; prepare_pretrain_dataset.py reads plain text" if {"target", "text"} & value.keys() else ""
        raise BadRecord("'messages' missing", f"'messages' is missing (compulsory){remedy}")
    return "messages"


def _parse_openai(value: dict[str, Any]) -> list[Message]:
    return parse_messages(value, role_field="role", roles=OPENAI_ROLES)


def _parse_sharegpt(value: dict[str, Any]) -> list[Message]:
    messages = parse_messages(value, field="conversations", content_field="value", roles=SHAREGPT_ROLES)
    return [*_take_system(value), *messages] if messages[0].role != "system" else messages


def _parse_alpaca(value: dict[str, Any]) -> list[Message]:
    """`input`: the text that the instruction is about, if any; `system` and `history` are optional too."""
    text = take_string(value, "instruction")
    if value.get("input"):
        text += "\n\n" + take_string(value, "input")
    earlier = value.get("history") or []
    if not isinstance(earlier, list):
        raise BadRecord("'history' not an array", "'history' is not an array of pairs of strings")
    turns = []
    for pair in earlier:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(one, str) for one in pair):
            raise BadRecord("'history' not pairs", "'history' is not an array of pairs of strings")
        turns += [Message("human", pair[0]), Message("assistant", pair[1])]
    question = [Message("human", text), Message("assistant", take_string(value, "output"))]
    return [*_take_system(value), *turns, *question]


def _take_system(value: dict[str, Any]) -> list[Message]:
    return [Message("system", take_string(value, "system"))] if value.get("system") else []


FORMATS = {
    "messages": InputFormat("from, content", ("messages",), parse_messages),
    "openai": InputFormat("OpenAI's (role, content)", ("messages",), _parse_openai),
    "sharegpt": InputFormat("ShareGPT's (conversations)", ("conversations", "system"), _parse_sharegpt),
    "alpaca": InputFormat(
        "Alpaca's (instruction, output)",
        ("instruction", "input", "output", "system", "history"),
        _parse_alpaca,
    ),
}
