"""A fast engine in use: texts that it may take, a checked sample, borders from the bytes of tokens."""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from colossal_llama.dataset.engines.base import Engine, TextEncoder
from colossal_llama.tokenizer.pieces_file import SPACE_SYMBOL
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.tokenizer.tokenizer_files import steps_of

TEXTS_PER_CHECK = 1000
MAX_SHOWN = 100


class EngineDifference(Exception):
    """An engine made other ids of a text than the Hugging Face library."""

    def __init__(self, engine: str, text: str, what: str) -> None:
        self.engine, self.text, self.what = engine, text, what
        super().__init__(engine, text, what)

    def __str__(self) -> str:
        text = self.text if len(self.text) <= MAX_SHOWN else self.text[:MAX_SHOWN] + "…"
        return f"{self.engine} and tokenizers differ ({self.what}) on {text!r}"


class NotForThisTokenizer(Exception):
    """An engine can't stand in for the tokenizer; the message says why."""


class CheckedEngine:
    """Encodes with an engine, and has one text in 1,000 encoded by the reference too.

    A hash of the text chooses, so the same texts are checked whatever the number of workers. Texts in which
    ids or borders may depend on more than the vocabulary are left to the reference: see `is_left_out`.

    Args:
        name: of the engine, for messages.
        table: the bytes of each token.
        words: ordinary added tokens, at which the reference cuts a text.
    """

    def __init__(
        self, name: str, engine: Engine, reference: TextEncoder, table: TokenBytes, words: Sequence[str] = ()
    ) -> None:
        self.name, self.engine, self.reference, self.table = name, engine, reference, table
        self._words = re.compile("|".join(map(re.escape, words))) if words else None
        self._lengths = table.lengths
        self._bytes_of = table.contents.__getitem__

    @classmethod
    def of_file(cls, name: str, engine: Engine, reference: TextEncoder, tokenizer_json: str) -> CheckedEngine:
        """For the tokenizer that the reference has; raises `NotForThisTokenizer`."""
        return cls(name, engine, reference, *read_vocabulary(Path(tokenizer_json).read_bytes()))

    def is_left_out(self, text: str) -> bool:
        """Whether the reference encodes this text: U+2581, which is a space to some, or an added word."""
        return SPACE_SYMBOL in text or (self._words is not None and self._words.search(text) is not None)

    def encode(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        left_out = [self.is_left_out(text) for text in texts]
        of_reference = iter(self.reference.encode([t for t, out in zip(texts, left_out, strict=True) if out]))
        own = iter(self._encode_own([t for t, out in zip(texts, left_out, strict=True) if not out]))
        for out in left_out:
            yield next(of_reference) if out else next(own)

    def encode_with_borders(
        self, texts: Sequence[str], positions: Sequence[int]
    ) -> Iterator[tuple[Sequence[int], int]]:
        """See `TextEncoder`."""
        for text, position, ids in zip(texts, positions, self.encode(texts), strict=True):
            border = None if self.is_left_out(text) else self._find_border(text, position, ids)
            if border is None:
                yield next(iter(self.reference.encode_with_borders([text], [position])))
                continue
            if is_checked(text):
                _, wanted = next(iter(self.reference.encode_with_borders([text], [position])))
                if border != wanted:
                    what = f"the border at character {position} is behind token {border}, not {wanted}"
                    raise EngineDifference(self.name, text, what)
            yield ids, border

    def _encode_own(self, texts: Sequence[str]) -> Iterator[Sequence[int]]:
        for text, ids in zip(texts, self.engine.encode(texts), strict=True):
            if is_checked(text):
                raise_difference(self.name, text, ids, next(iter(self.reference.encode([text]))))
            yield ids

    def _find_border(self, text: str, position: int, ids: Sequence[int]) -> int | None:
        """The tokens that end within `position` characters; None where the tokens joined are not the text."""
        content = text.encode()
        array = np.asarray(ids, dtype=np.int64)
        if array.size and array.max() >= len(self._lengths):
            return None
        joined = b"".join(map(self._bytes_of, array.tolist()))
        prefix = len(joined) - len(content)  # a space that the tokenizer puts before a text is in no text
        if prefix not in (0, 1) or joined[prefix:] != content or joined[:prefix] not in (b"", b" "):
            return None
        ends = np.cumsum(self._lengths[array])
        return int(np.searchsorted(ends, len(text[:position].encode()) + prefix, side="right"))


def read_vocabulary(tokenizer_json: bytes) -> tuple[TokenBytes, list[str]]:
    """The bytes of each token, and the added words as of `find_words`; raises `NotForThisTokenizer`."""
    value = _load_without_merges(tokenizer_json)
    table = TokenBytes.of_value(value)
    if table is None:
        raise NotForThisTokenizer("it is neither like LLaMA-2's nor byte-level")
    return table, find_words(value)


def _load_without_merges(tokenizer_json: bytes) -> dict[str, Any]:
    """A parsed `tokenizer.json`; if its merges stand last, as `tokenizers` writes them, without them.

    They take three quarters of the time. (In a string, the quotes of the key would be escaped.)
    """
    head, key, _ = tokenizer_json.rpartition(b'"merges":')
    with contextlib.suppress(orjson.JSONDecodeError):
        value = orjson.loads(head + key + b"[]}}")
        if value.keys() >= {"normalizer", "pre_tokenizer", "added_tokens"} and "vocab" in value["model"]:
            return value
    return orjson.loads(tokenizer_json)


def is_checked(text: str) -> bool:
    """Whether this text is one of the sample."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % TEXTS_PER_CHECK == 0


def raise_difference(engine: str, text: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises `EngineDifference` where the ids of a text are not those that they should be."""
    found, wanted = _as_list(found), _as_list(wanted)
    if found == wanted:
        return
    pairs = zip(found, wanted, strict=False)
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted)))
    what = " and ".join(str(ids[index]) if index < len(ids) else "none" for ids in (found, wanted))
    raise EngineDifference(engine, text, f"token {index} is {what}")


def _as_list(ids: Sequence[int]) -> list[int]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)


def find_words(serialised: dict[str, Any]) -> list[str]:
    """What a text must hold for the tokenizer to find an ordinary added token in it.

    Raises:
        NotForThisTokenizer: that can't be told from the text as it is.
    """
    tokens = [token for token in serialised.get("added_tokens", []) if not token["special"]]
    steps = steps_of(serialised.get("normalizer"))
    words = []
    for token in tokens:
        word = token["content"]
        if token.get("normalized") and steps:
            if not all(_is_about_spaces(step) for step in steps):
                raise NotForThisTokenizer(f"it looks for the added token {word!r} in normalised text")
            word = word.strip(f" {SPACE_SYMBOL}")
            if " " in word or SPACE_SYMBOL in word:
                word = re.split(f"[ {SPACE_SYMBOL}]", word)[0]
        if not word:
            raise NotForThisTokenizer("an added token of it consists of spaces")
        words.append(word)
    return words


def _is_about_spaces(step: Any) -> bool:
    """Whether a step of a normaliser writes spaces as U+2581, or puts one before the text, and no more."""
    if step["type"] == "Prepend":
        return step["prepend"] in (" ", SPACE_SYMBOL)
    return (
        step["type"] == "Replace"
        and step["content"] == SPACE_SYMBOL
        and step["pattern"] in ({"String": " "}, {"Regex": r"\A(?=[ ▁])"})
    )
