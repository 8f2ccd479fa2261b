"""The records of conversations, whatever template they are written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from colossal_llama.conversation.messages import Message, parse_messages
from colossal_llama.corpus.records import take_string

DEFAULT_CATEGORY = "unknown"


@dataclass(frozen=True)
class ConversationRecord:
    messages: list[Message]
    category: str

    @property
    def num_characters(self) -> int:
        return sum(len(message.content) for message in self.messages)

    @property
    def text(self) -> str:
        return "\0".join(message.content for message in self.messages)

    def as_json(self) -> dict[str, Any]:
        messages = [{"from": message.role, "content": message.content} for message in self.messages]
        return {"messages": messages, "category": self.category}


def parse_conversation(value: dict[str, Any]) -> ConversationRecord:
    """`{"messages": [{"from", "content"}, …]}`; `category` is optional. Raises `BadRecord`."""
    is_given = value.get("category") is not None  # exports write null for what is not there
    category = take_string(value, "category") if is_given else DEFAULT_CATEGORY
    return ConversationRecord(parse_messages(value), category)


def describe_conversation(messages: Sequence[Message]) -> list[str]:
    """Peculiarities of a conversation that are counted in the statistics."""
    turns = [message for message in messages if message.role != "system"]
    facts = {
        "own system message": len(turns) < len(messages),
        "starts with the assistant": bool(turns) and turns[0].role == "assistant",
        "ends with the human": bool(turns) and turns[-1].role == "human",
        "empty content": any(not message.content for message in messages),
        "same role twice": any(a.role == b.role for a, b in pairwise(turns)),
    }
    return [fact for fact, holds in facts.items() if holds]
