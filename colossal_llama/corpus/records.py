"""One line of JSONL to one JSON object, and the strings in it; what is wrong is said in a user's words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from typing import Any

import orjson

from colossal_llama.utils.files import json_type

_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
DEFAULT_CATEGORY = "unknown"


class BadRecord(Exception):
    """A record that can't be used: `kind` is what it is counted under, the message says what is wrong."""

    def __init__(self, kind: str, message: str | None = None) -> None:
        self.kind = kind
        super().__init__(message or kind)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; raises `BadRecord` when there is none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as decode_error:
            raise BadRecord("not UTF-8", f"not UTF-8 text (byte {decode_error.start})") from None
        reason = _find_foreign_value(text) or f"{error.msg}, column {error.colno}"
        raise BadRecord("not valid JSON", f"not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object", f"not a JSON object but {json_type(value)}")
    return value


def _find_foreign_value(text: str) -> str | None:
    """Names the value of a line that Python's library writes and reads, and JSON does not have."""
    try:
        value = json.loads(text, parse_int=float)  # whole numbers have a limit of their own
    except (ValueError, RecursionError):
        return None
    return _describe_foreign(value, "")


def _describe_foreign(value: Any, where: str) -> str | None:
    if isinstance(value, dict):
        inside = [(f"{where}.{key}" if where else key, item) for key, item in value.items()]
        return _describe_foreign(list(value), f"a name in {where or 'the record'}") or _first_foreign(inside)
    if isinstance(value, list):
        return _first_foreign((f"{where}[{number}]", item) for number, item in enumerate(value))
    if isinstance(value, str) and (found := _LONE_SURROGATE.search(value)):
        half = f"\\u{ord(found.group()):04x}"
        return f"{where!r} holds half of a surrogate pair, {half}; write the whole pair or remove it"
    if isinstance(value, float) and not math.isfinite(value):
        what = "NaN" if math.isnan(value) else "infinite, or too large a number"
        return f"{where!r} is {what}; write null, or the record without it"
    return None


def _first_foreign(items: Iterable[tuple[str, Any]]) -> str | None:
    return next((found for where, item in items if (found := _describe_foreign(item, where))), None)


def take_string(record: dict[str, Any], field: str) -> str:
    """The string in `record[field]`; raises `BadRecord` when it is missing or something else."""
    value = record.get(field)
    if isinstance(value, str):
        return value
    if field not in record:
        raise BadRecord(
            f"'{field}' missing", f"'{field}' is missing (compulsory; found {_field_names(record)})"
        )
    raise BadRecord(f"'{field}' not a string", f"'{field}' is {json_type(value)}, not a string")


def is_plain_text(record: dict[str, Any]) -> bool:
    """Whether a record has a `text`, and is neither a pre-training record nor a conversation."""
    return isinstance(record.get("text"), str) and not {"source", "target", "messages"} & record.keys()


def take_category(record: dict[str, Any]) -> str:
    """The string in `category`, where it is optional; raises `BadRecord` when it is something else."""
    is_given = record.get("category") is not None  # exports write null for what is not there
    return take_string(record, "category") if is_given else DEFAULT_CATEGORY


def _field_names(record: dict[str, Any]) -> str:
    names = [repr(name) for name in list(record)[:6]]
    return ", ".join(names) + (", …" if len(record) > 6 else "") if names else "no field"
