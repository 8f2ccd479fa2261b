"""Records to documents: parsing, encoding in batches, the loss mask, and what does not fit a row.

A document is one int32 array. A token without loss is stored as the bitwise complement of its id, so ids and
labels travel together and chunking is slicing:

    source "a b", target "c"     BOS  a  b  c EOS      ids
                                  ~1 ~5 ~6  7   2      stored: `~id` is below zero
                                -100 … …    7   2      labels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from colossal_llama.dataset.conversation import (
    DEFAULT_SYSTEM,
    HEADERS,
    ROLES,
    SYSTEM_END,
    Message,
    SpecialTokens,
    render_turns,
)
from colossal_llama.dataset.jsonl import BadRecord, json_type, take_string
from colossal_llama.dataset.labels import NO_LOSS_LABEL, has_loss

DEFAULT_CATEGORY = "unknown"
# Special tokens, or lists of them, by the names that a chat template has for them.
TemplateTokens = tuple[tuple[str, str | tuple[str, ...]], ...]


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides how a record becomes token ids; equal specs give equal documents.

    Args:
        kind: "pretrain", "sft", or "chat_template".
        bos_id, end_id: the ids added to a text: EOS after a document, or the end of a turn.
        max_length: longest piece, in tokens.
        truncate: cut long documents off instead of chunking them (pretrain).
        tokenizer_json: path of the serialised fast tokenizer; its name is a digest of its content.
        template, template_tokens: the tokenizer's own chat template, and its special tokens by name.
    """

    kind: str
    bos_id: int
    end_id: int
    max_length: int
    truncate: bool = False
    tokenizer_json: str = ""
    template: str = ""
    template_tokens: TemplateTokens = ()

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """What ends an answer; a template of the tokenizer's own shows it in its rows alone."""
        return (self.end_id,) if self.kind == "sft" else ()

    def as_key(self) -> dict[str, Any]:
        """What the encoding depends on: a tokenizer's content, wherever it is."""
        return {**asdict(self), "tokenizer_json": Path(self.tokenizer_json).name}


@dataclass
class Outcome:
    """What became of a record: pieces to keep, and where every other token went.

    `num_tokens` is the sum of the pieces' lengths and of `dropped_tokens`. Without pieces the record is
    dropped for `reason`. `notes` are counted, nothing more.
    """

    num_tokens: int
    pieces: list[np.ndarray] = field(default_factory=list)
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PretrainRecord:
    source: str
    target: str
    category: str

    @property
    def num_characters(self) -> int:
        return len(self.source) + len(self.target)


@dataclass(frozen=True)
class ConversationRecord:
    messages: list[Message]
    category: str

    @property
    def num_characters(self) -> int:
        return sum(len(message.content) for message in self.messages)


class RecordEncoder(Protocol):
    """One kind of data set: how its records are read and encoded."""

    def parse(self, value: dict[str, Any]) -> Any:
        """The record in a JSON object; raises `BadRecord`."""

    def encode(self, records: Sequence[Any]) -> list[Outcome]:
        """What becomes of each record, in order."""


def split_signed(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, labels)` of stored tokens, int32 arrays of the same shape."""
    input_ids = stored ^ (stored >> 31)  # ~x where x is below zero
    labels = np.where(stored < 0, np.int32(NO_LOSS_LABEL), stored)
    return input_ids, labels


@lru_cache(maxsize=1)
def load_encoder(spec: EncoderSpec) -> RecordEncoder:
    """The encoder of a spec, loaded once a process."""
    if spec.kind == "pretrain":
        return PretrainEncoder(spec)
    if spec.kind == "chat_template":
        from colossal_llama.dataset.chat_template import ChatTemplateEncoder  # imports transformers

        return ChatTemplateEncoder(spec)
    return ConversationEncoder(spec)


def load_plain_backend(tokenizer_json: str) -> Tokenizer:
    """The Rust tokenizer, set to encode text as it is: nothing added, cut or padded, no special tokens.

    The post-processor only adds special tokens and trims spaces from offsets; without it every character
    belongs to the token that it came from.
    """
    backend = Tokenizer.from_file(tokenizer_json)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


class PretrainEncoder:
    """`{"source", "target", "category"}`: BOS + source + target + EOS, loss on what ends beyond `source`."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.backend = load_plain_backend(spec.tokenizer_json)

    def parse(self, value: dict[str, Any]) -> PretrainRecord:
        return PretrainRecord(
            take_string(value, "source"), take_string(value, "target"), take_string(value, "category")
        )

    def encode(self, records: Sequence[PretrainRecord]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(records)
        without_source = [i for i, record in enumerate(records) if not record.source]
        with_source = [i for i, record in enumerate(records) if record.source]
        texts = [records[i].target for i in without_source]
        for i, encoding in zip(
            without_source, self.backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            outcomes[i] = self._finish(records[i], self._add_ends(encoding.ids))
        # Only these need offsets, which cost a part of the tokenizer's speed.
        texts = [records[i].source + records[i].target for i in with_source]
        for i, encoding in zip(
            with_source, self.backend.encode_batch(texts, add_special_tokens=False), strict=True
        ):
            stored = self._add_ends(encoding.ids)
            num_without_loss = 1 + find_first_token_beyond(encoding, len(records[i].source))
            stored[:num_without_loss] = ~stored[:num_without_loss]
            outcomes[i] = self._finish(records[i], stored)
        return outcomes  # type: ignore[return-value]

    def _add_ends(self, ids: list[int]) -> np.ndarray:
        stored = np.empty(len(ids) + 2, dtype=np.int32)
        stored[0] = self.spec.bos_id
        stored[1:-1] = ids
        stored[-1] = self.spec.end_id
        return stored

    def _finish(self, record: PretrainRecord, stored: np.ndarray) -> Outcome:
        num_tokens = len(stored)
        if not record.target:
            reason = "empty target" if record.source else "empty record"
            return Outcome(num_tokens, dropped_tokens={reason: num_tokens}, reason=reason)
        max_length = self.spec.max_length
        if num_tokens <= max_length:
            return Outcome(num_tokens, [stored])
        if self.spec.truncate:
            return _truncate(stored, max_length)
        return _chunk(stored, max_length)


def find_first_token_beyond(encoding: Any, num_characters: int) -> int:
    """Index of the first token that ends beyond the first `num_characters` characters of its text.

    `encoding` is a `tokenizers.Encoding` with offsets. When no token does (the text is no longer, or the
    normaliser removed the rest), the number of tokens.
    """
    index = encoding.char_to_token(num_characters)
    if index is not None:
        return index
    for index, (_, end) in enumerate(encoding.offsets):
        if end > num_characters:
            return index
    return len(encoding)


def _truncate(stored: np.ndarray, max_length: int) -> Outcome:
    kept, num_cut = stored[:max_length], len(stored) - max_length
    if not has_loss(kept):
        reason = "no label in the part kept"
        return Outcome(len(stored), dropped_tokens={reason: len(stored)}, reason=reason)
    return Outcome(len(stored), [kept], {"beyond max_length": num_cut}, notes=["truncated"])


def _chunk(stored: np.ndarray, max_length: int) -> Outcome:
    """Full rows and a remainder, BOS in the first, EOS in the last; a chunk without loss is dropped."""
    outcome = Outcome(len(stored), notes=["chunked"])
    start = 0
    while start < len(stored):
        end = _end_of_chunk(stored, start, max_length)
        chunk = stored[start:end]
        if has_loss(chunk):
            outcome.pieces.append(chunk)
        else:
            reason = "chunk without label"
            outcome.dropped_tokens[reason] = outcome.dropped_tokens.get(reason, 0) + len(chunk)
        start = end
    if not outcome.pieces:
        outcome.reason = "chunk without label"
    return outcome


def _end_of_chunk(stored: np.ndarray, start: int, max_length: int) -> int:
    """Where the chunk that begins at `start` ends.

    The first token of a row has no loss. When it is the only label of the next chunk (a remainder of one
    token, most often), this chunk leaves it a token; and all that it can take, where this chunk has no loss
    without that token and would be dropped:

        rows of 4    a b c d | e          a b c | d e          the label is e's
                    ~a~b~c d | e         ~a | ~b~c d e         ~ is without label
    """
    end = min(start + max_length, len(stored))
    following = stored[end : end + max_length]
    if not len(following) or following[0] < 0 or has_loss(following):
        return end
    return end - 1 if has_loss(stored[start : end - 1]) else end + 1 - max_length


def parse_conversation(value: dict[str, Any]) -> ConversationRecord:
    """`{"messages": [{"from", "content"}, …]}`; `category` is optional. Raises `BadRecord`."""
    is_given = value.get("category") is not None  # exports write null for what is not there
    category = take_string(value, "category") if is_given else DEFAULT_CATEGORY
    messages = value.get("messages")
    if "messages" not in value:
        raise BadRecord("'messages' missing", "'messages' is missing (compulsory)")
    if not isinstance(messages, list):
        raise BadRecord("'messages' not an array", f"'messages' is {json_type(messages)}, not an array")
    if not messages:
        raise BadRecord("'messages' empty", "'messages' is empty")
    return ConversationRecord([_parse_message(m, i) for i, m in enumerate(messages)], category)


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


class ConversationEncoder:
    """Conversations in the template of `conversation.py`: whole turns up to `max_length`."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.special = SpecialTokens(spec.bos_id, spec.end_id)
        self.backend = load_plain_backend(spec.tokenizer_json)
        self.fixed_texts: dict[str, list[int]] = {}
        fixed = [*HEADERS.values(), *(DEFAULT_SYSTEM + SYSTEM_END + header for header in HEADERS.values())]
        self.fixed_texts = dict(zip(fixed, self._encode_texts(fixed), strict=True))

    def parse(self, value: dict[str, Any]) -> ConversationRecord:
        return parse_conversation(value)

    def encode(self, records: Sequence[ConversationRecord]) -> list[Outcome]:
        rendered = [render_turns(record.messages, self.special) for record in records]
        texts = [
            segment.text
            for turns in rendered
            for segments in turns
            for segment in segments
            if segment.text and segment.text not in self.fixed_texts
        ]
        encoded = iter(self._encode_texts(texts))
        outcomes = []
        for record, turns in zip(records, rendered, strict=True):
            ids: list[int] = []
            loss_spans, turn_ends, answers = [], [], []
            for segments in turns:
                has_loss = False
                for segment in segments:
                    start = len(ids)
                    if segment.token_id is not None:
                        ids.append(segment.token_id)
                    elif segment.text:
                        fixed = self.fixed_texts.get(segment.text)
                        ids.extend(next(encoded) if fixed is None else fixed)
                    if segment.has_loss:
                        loss_spans.append((start, len(ids)))
                        has_loss = True
                turn_ends.append(len(ids))
                answers.append(has_loss)
            plain = np.array(ids, dtype=np.int32)
            stored = ~plain
            for start, end in loss_spans:
                stored[start:end] = plain[start:end]
            outcomes.append(keep_whole_turns(record, stored, turn_ends, answers, self.spec.max_length))
        return outcomes

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def keep_whole_turns(
    record: ConversationRecord,
    stored: np.ndarray,
    turn_ends: Sequence[int],
    answers: Sequence[bool],
    max_length: int,
) -> Outcome:
    """The longest run of whole turns from the start that fits `max_length` and ends with an answer.

    Args:
        stored: the whole conversation's tokens.
        turn_ends: number of tokens up to the end of each turn.
        answers: whether each turn has loss.
    """
    outcome = Outcome(len(stored), notes=describe_conversation(record.messages))
    ends = [end for end, has_loss in zip(turn_ends, answers, strict=True) if has_loss]
    fitting = [end for end in ends if end <= max_length]
    if not fitting:
        outcome.reason = "first answer beyond max_length" if ends else "no answer"
        outcome.dropped_tokens = {outcome.reason: len(stored)} if len(stored) else {}
        return outcome
    outcome.pieces = [stored[: fitting[-1]]]
    if len(stored) > ends[-1]:
        outcome.dropped_tokens["after the last answer"] = len(stored) - ends[-1]
    if ends[-1] > fitting[-1]:
        outcome.dropped_tokens["turns beyond max_length"] = ends[-1] - fitting[-1]
        outcome.notes.append("cut to whole turns")
    return outcome


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
