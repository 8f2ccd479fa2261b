"""The messages of a conversation, as JSONL records hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from colossal_llama.corpus.records import BadRecord, take_string
from colossal_llama.utils.files import json_type

ROLES = ("human", "assistant", "system")
OWN_ROLES = {role: role for role in ROLES}
# Their names in `apply_chat_template`, and in OpenAI's format.
ROLE_NAMES = {"human": "user", "assistant": "assistant", "system": "system"}


class Message(NamedTuple):
    """One message of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


def as_chat(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as `apply_chat_template` takes them."""
    return [{"role": ROLE_NAMES[message.role], "content": message.content} for message in messages]


def parse_messages(
    value: dict[str, Any],
    field: str = "messages",
    role_field: str = "from",
    content_field: str = "content",
    roles: Mapping[str, str] = OWN_ROLES,
) -> list[Message]:
    """The messages of `{"messages": [{"from", "content"}, …]}`, or of other names; raises `BadRecord`.

    Args:
        roles: a role in the record -> one of `ROLES`.
    """
    messages = value.get(field)
    if field not in value:
        raise BadRecord(f"'{field}' missing", f"'{field}' is missing (compulsory)")
    if not isinstance(messages, list):
        raise BadRecord(f"'{field}' not an array", f"'{field}' is {json_type(messages)}, not an array")
    if not messages:
        raise BadRecord(f"'{field}' empty", f"'{field}' is empty")
    parsed = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise BadRecord("message not an object", f"{where} is {json_type(message)}, not an object")
        try:
            name, content = take_string(message, role_field), take_string(message, content_field)
        except BadRecord as error:
            raise BadRecord(f"message {error.kind}", f"{where}: {error}") from None
        role = roles.get(name)
        if role is None:
            raise BadRecord(
                "unknown role", f"{where}: unknown role {name!r} (choose from {', '.join(roles)})"
            )
        if role == "system" and index > 0:
            raise BadRecord("system message inside", f"{where}: a system message has to be the first")
        parsed.append(Message(role, content))
    return parsed
