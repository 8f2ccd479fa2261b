"""Held-out documents from JSONL pre-training records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from colossal_llama.corpus.jsonl import find_input_files, make_shards, read_lines
from colossal_llama.corpus.records import BadRecord, is_plain_text, parse_object, take_category, take_string
from colossal_llama.training.data.sets import set_names
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.messages import MAX_LISTED_PROBLEMS


@dataclass(frozen=True)
class Document:
    """A text that models are compared on.

    Attributes:
        set: name of its directory.
        source: what comes before it, without loss.
        target: what counts.
    """

    set: str
    category: str
    source: str
    target: str

    @property
    def text(self) -> str:
        return self.source + self.target

    @property
    def num_source_bytes(self) -> int:
        return len(self.source.encode())

    @property
    def num_bytes(self) -> int:
        """Of what counts."""
        return len(self.target.encode())


def read_documents(directories: Sequence[Path], flag: str = "--data_input_dirs") -> list[Document]:
    """The documents of all directories, in their order; records without target are left out, and counted.

    Args:
        flag: the argument that named them, for messages.

    Raises:
        UserError: naming the records that are none (once 20 are found, or at the end), or no text at all.
    """
    names = set_names(directories)
    documents: list[Document] = []
    problems: list[str] = []
    num_empty = 0
    shards = make_shards(find_input_files(directories))
    for path, parts in groupby(shards, key=lambda shard: shard.path):
        number = 0
        for shard in parts:
            for line in read_lines(shard):
                number += 1
                if not line.strip():
                    continue
                try:
                    document = _parse(line, names[shard.input_dir])
                except BadRecord as error:
                    problems.append(f"{path}:{number}: {error}")
                    if len(problems) == MAX_LISTED_PROBLEMS:
                        raise UserError([*problems, "reading stopped after the 20th bad record"]) from None
                    continue
                if document.target:
                    documents.append(document)
                else:
                    num_empty += 1
    if problems:
        raise UserError(problems)
    if num_empty:
        log(f"Left out: {num_empty:,} records with an empty target")
    for directory, name in zip(directories, names, strict=True):
        if not any(document.set == name for document in documents):
            raise UserError(f"{flag} {directory}: no record with a target in it")
    return documents


def _parse(line: bytes, set_name: str) -> Document:
    record = parse_object(line)
    if "messages" in record and "target" not in record:
        raise BadRecord("a conversation", "a conversation; give pre-training records (source, target)")
    if is_plain_text(record):
        return Document(set_name, take_category(record), "", record["text"])
    return Document(
        set_name,
        take_string(record, "category"),
        take_string(record, "source"),
        take_string(record, "target"),
    )


def documents_digest(documents: Sequence[Document]) -> str:
    """Changes when a text or their order does."""
    digest = hashlib.sha256()
    for document in documents:
        for text in (document.source, document.target):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]
