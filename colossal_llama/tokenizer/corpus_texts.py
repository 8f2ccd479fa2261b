"""The texts of JSONL corpora: pre-training records, conversations, plain texts; told apart by the fields."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from colossal_llama.corpus.jsonl import find_input_files, make_shards, read_records
from colossal_llama.corpus.records import BadRecord, is_plain_text, parse_object, take_string
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import MAX_LISTED_PROBLEMS


def read_samples(directories: list[Path], text_field: str = "") -> Iterator[str]:
    """One text for each record: `source` + `target`, the contents of all messages, a line each, or `text`.

    Args:
        text_field: the field that holds each record's text, whatever else is in it; empty: told apart.

    Raises:
        UserError: naming the records that are none of these (once 20 are found, or at the end).
    """
    problems = []
    shards = make_shards(find_input_files(directories))
    for path, parts in groupby(shards, key=lambda shard: shard.path):
        number = 0
        for shard in parts:
            for line in read_records(shard):
                number += 1
                is_row = isinstance(line, dict)
                if not is_row and not line.strip():
                    continue
                try:
                    record = line if is_row else parse_object(line)
                    yield take_string(record, text_field) if text_field else text_of(record)
                except BadRecord as error:
                    problems.append(f"{path}:{number}: {error}")
                    if len(problems) == MAX_LISTED_PROBLEMS:
                        raise UserError([*problems, "reading stopped after the 20th bad record"]) from None
    if problems:
        raise UserError(problems)


def text_of(record: dict[str, Any]) -> str:
    """The text of one record; raises `BadRecord` when it is of no known kind."""
    if is_plain_text(record):
        return record["text"]
    if "messages" not in record:
        return take_string(record, "source") + take_string(record, "target")
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadRecord("'messages' not an array of objects")
    return "\n".join(take_string(message, "content") for message in messages)
