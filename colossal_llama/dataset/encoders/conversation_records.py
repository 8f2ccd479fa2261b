"""The records of conversations, whatever template they are written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import eq
from typing import Any

from colossal_llama.conversation.formats import FORMATS, find_format
from colossal_llama.conversation.messages import Message
from colossal_llama.corpus.records import take_category

# All that a format may read of a record.
CONVERSATION_FIELDS = ("category", *dict.fromkeys(name for form in FORMATS.values() for name in form.fields))


@dataclass(frozen=True)
class ConversationRecord:
    """`format`: the input format that it came in, a name in `FORMATS`."""

    messages: list[Message]
    category: str
    format: str = field(default="messages", kw_only=True)

    @cached_property
    def num_characters(self) -> int:
        return sum([len(message.content) for message in self.messages])

    @property
    def text(self) -> str:
        return "\0".join(message.content for message in self.messages)

    def as_json(self) -> dict[str, Any]:
        messages = [{"from": message.role, "content": message.content} for message in self.messages]
        return {"messages": messages, "category": self.category}


def parse_conversation(value: dict[str, Any]) -> ConversationRecord:
    """A record in one of `FORMATS`; `category` is optional. Raises `BadRecord`."""
    category = take_category(value)
    name = find_format(value)
    return ConversationRecord(FORMATS[name].parse(value), category, format=name)


def describe_conversation(messages: Sequence[Message]) -> list[str]:
    """Peculiarities of a conversation that are counted in the statistics."""
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles  # a system message is the first
    facts = []
    if len(turns) < len(roles):
        facts.append("own system message")
    if turns and turns[0] == "assistant":
        facts.append("starts with the assistant")
    if turns and turns[-1] == "human":
        facts.append("ends with the human")
    if not all(message.content for message in messages):
        facts.append("empty content")
    if any(map(eq, turns, turns[1:])):
        facts.append("same role twice")
    return facts
