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
        if isinstance(message, dict):
            name, content = message.get(role_field), message.get(content_field)
            role = roles.get(name) if isinstance(name, str) and isinstance(content, str) else None
            if role is not None and (index == 0 or role != "system"):
                parsed.append(Message(role, content))
                continue
        raise _describe_bad_message(message, f"{field}[{index}]", role_field, content_field, roles)
    return parsed


def _describe_bad_message(
    message: Any, where: str, role_field: str, content_field: str, roles: Mapping[str, str]
) -> BadRecord:
    """What is wrong with a message that can't be used."""
    if not isinstance(message, dict):
        return BadRecord("message not an object", f"{where} is {json_type(message)}, not an object")
    try:
        name, _ = take_string(message, role_field), take_string(message, content_field)
    except BadRecord as error:
        return BadRecord(f"message {error.kind}", f"{where}: {error}")
    if name not in roles:
        return BadRecord("unknown role", f"{where}: unknown role {name!r} (choose from {', '.join(roles)})")
    return BadRecord("system message inside", f"{where}: a system message has to be the first")
