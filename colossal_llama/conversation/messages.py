"""The messages of a conversation, as JSONL records hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from colossal_llama.corpus.records import BadRecord, take_string
from colossal_llama.utils.files import json_type

ROLES = ("human", "assistant", "system")


@dataclass(frozen=True)
class Message:
    """One message of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


def parse_messages(value: dict[str, Any]) -> list[Message]:
    """The messages of `{"messages": [{"from", "content"}, …]}`; raises `BadRecord`."""
    messages = value.get("messages")
    if "messages" not in value:
        raise BadRecord("'messages' missing", "'messages' is missing (compulsory)")
    if not isinstance(messages, list):
        raise BadRecord("'messages' not an array", f"'messages' is {json_type(messages)}, not an array")
    if not messages:
        raise BadRecord("'messages' empty", "'messages' is empty")
    return [_parse_message(message, index) for index, message in enumerate(messages)]


def _parse_message(value: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(value, dict):
        raise BadRecord("message not an object", f"{where} is {json_type(value)}, not an object")
    try:
        role, content = take_string(value, "from"), take_string(value, "content")
    except BadRecord as error:
        raise BadRecord(f"message {error.kind}", f"{where}: {error}") from None
    if role not in ROLES:
        raise BadRecord("unknown role", f"{where}: unknown role {role!r} (choose from {', '.join(ROLES)})")
    if role == "system" and index > 0:
        raise BadRecord("system message inside", f"{where}: a system message has to be the first")
    return Message(role, content)
