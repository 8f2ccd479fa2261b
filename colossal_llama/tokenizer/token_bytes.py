"""Token id -> the bytes of text that the token stands for: what makes losses per byte, and borders in a text.

    "Zürich" in LLaMA-2 pieces      ▁Z    ü          rich        and where `ü` is no piece
    bytes                           " Z"  c3 bc      "rich"      <0xC3> <0xBC> are one byte each
    ends in the text                1     3          7           the first space is the tokenizer's own

The table is made from a serialized fast tokenizer, sentencepiece-like (LLaMA-2) or byte-level (LLaMA-3). The
tokens of a text joined are the text, byte for byte, with two exceptions that come from the tokenizer:

- Many put a space before a text (the dummy prefix). It is recognised, and is no byte of the text.
- To sentencepiece, the character U+2581 and a space are one and the same. Ids alone count it as one byte, not
  as three; `ends_in` has the text, and gets it right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from colossal_llama.tokenizer import byte_alphabet
from colossal_llama.tokenizer.pieces_file import SPACE_SYMBOL
from colossal_llama.tokenizer.tokenizer_files import steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class DummyPrefix:
    """The space that a tokenizer puts before text of its own accord.

    Attributes:
        place: before a whole text, or before each stretch of it between added tokens.
        spares_spaces: not where the text starts with a space anyway.
    """

    place: Literal["text", "stretch"]
    spares_spaces: bool


class TokenBytes:
    """The table of one tokenizer.

    Attributes:
        contents: bytes of each id, ids without meaning and special tokens included: `b""`.
        lengths: their numbers, int64 [ids].
        prefix: the space that the tokenizer adds; None when it adds none.
        added_ids: tokens at which a text is cut before it is split: special ones and added words.
        writes_spaces_as_symbol: whether U+2581 in a text is a space to the tokenizer.
    """

    def __init__(
        self,
        contents: Sequence[bytes],
        prefix: DummyPrefix | None,
        added_ids: Iterable[int],
        writes_spaces_as_symbol: bool,
    ) -> None:
        self.contents = list(contents)
        self.lengths = np.array([len(content) for content in contents], dtype=np.int64)
        self.prefix, self.added_ids = prefix, frozenset(added_ids)
        self.writes_spaces_as_symbol = writes_spaces_as_symbol

    @classmethod
    def of_json(cls, serialized: str, special_ids: Iterable[int] = ()) -> TokenBytes | None:
        """The table of a fast tokenizer, from its `tokenizer.json`; see `of_value`."""
        return cls.of_value(json.loads(serialized), special_ids)

    @classmethod
    def of_value(cls, fast: Mapping[str, Any], special_ids: Iterable[int] = ()) -> TokenBytes | None:
        """The table of a fast tokenizer, from its parsed `tokenizer.json`.

        Args:
            special_ids: special tokens that the file itself does not mark as such.

        Returns:
            None for a tokenizer of another kind, whose tokens can't be put together to the text.
        """
        splits = steps_of(fast.get("pre_tokenizer"))
        rewrites = steps_of(fast.get("normalizer"))
        if any(step["type"] == "ByteLevel" for step in splits):
            read, symbol = _read_byte_level, False
        elif any(
            (step["type"] == "Metaspace" and step.get("replacement") == SPACE_SYMBOL)
            or (step["type"] == "Replace" and step.get("content") == SPACE_SYMBOL)
            for step in (*splits, *rewrites)
        ):
            read, symbol = _read_pieces, True
        else:
            return None
        table = read(fast["model"])
        special = set(special_ids)
        for token in fast.get("added_tokens", []):
            is_special = token["special"] or token["id"] in special
            text = token["content"].replace(SPACE_SYMBOL, " ") if symbol else token["content"]
            table[token["id"]] = b"" if is_special else text.encode("utf-8", "surrogatepass")
        table.update(dict.fromkeys(special, b""))
        contents = [table.get(token_id, b"") for token_id in range(max(table, default=-1) + 1)]
        added = {token["id"] for token in fast.get("added_tokens", [])} | special
        return cls(contents, _find_prefix(rewrites, splits), added, symbol)

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes | None:
        """The table of a loaded tokenizer; None for one that is not fast, or of another kind."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return None if backend is None else cls.of_json(backend.to_str(), tokenizer.all_special_ids)

    def readable(self, token_id: int) -> str:
        """The text of a token as people read it; parts of characters as escapes (`\\xe0\\xb8`)."""
        return self.contents[token_id].decode("utf-8", "backslashreplace")

    @cached_property
    def _starts_with_space(self) -> np.ndarray:
        return np.array([content[:1] == b" " for content in self.contents], dtype=bool)

    def count(self, tokens: np.ndarray, previous: np.ndarray, bos_id: int | None) -> int:
        """The bytes of text that tokens stand for, without the tokenizer's own spaces.

        Args:
            tokens: ids that count, int [n].
            previous: the token before each of them, int [n].
            bos_id: a text begins behind it.
        """
        size = len(self.contents)
        known = (tokens >= 0) & (tokens < size)  # a padded vocabulary has more ids, and they are no text
        tokens, previous = tokens[known], previous[known]
        total = int(self.lengths[tokens].sum())
        if self.prefix is not None:
            starts = {bos_id} if self.prefix.place == "text" else {bos_id, *self.added_ids}
            begins = np.isin(previous, np.array([token for token in starts if token is not None], dtype=int))
            total -= int((begins & self._starts_with_space[tokens]).sum())
        return total

    def ends_in(self, text: str, ids: Sequence[int]) -> np.ndarray | None:
        """Where each token of an encoded text ends, counted in bytes of the text's UTF-8.

        Args:
            text: the text.
            ids: what the tokenizer makes of it, nothing added.

        Returns:
            int64 [ids], never falling; the last is the length of the text. None where the tokens joined are
            not the text: its normalizer rewrote it, or an added token took spaces beside it.
        """
        rewrites = self.writes_spaces_as_symbol and SPACE_SYMBOL in text
        content = (text.replace(SPACE_SYMBOL, " ") if rewrites else text).encode("utf-8", "surrogatepass")
        if any(not 0 <= token_id < len(self.contents) for token_id in ids):
            return None
        lengths = self.lengths[np.asarray(ids, dtype=np.int64)]
        position = start = 0
        for end in self._stretch_ends(ids):
            joined = b"".join([self.contents[token_id] for token_id in ids[start:end]])
            if self._has_prefix(ids, start, content, position) and self.contents[ids[start]][:1] == b" ":
                joined = joined[1:]
                lengths[start] -= 1
            if not content.startswith(joined, position):
                return None
            position += len(joined)
            start = end
        if position != len(content):
            return None
        ends = np.cumsum(lengths)
        if rewrites:
            # The symbol has two bytes more than the space that it was taken for.
            found = re.finditer(SPACE_SYMBOL.encode(), text.encode("utf-8", "surrogatepass"))
            symbols = np.array([match.end() for match in found]) - 2 * np.arange(
                1, text.count(SPACE_SYMBOL) + 1
            )
            ends += 2 * np.searchsorted(symbols, ends, side="right")
        return ends

    def _stretch_ends(self, ids: Sequence[int]) -> list[int]:
        """Cuts ids behind and before each added token."""
        cuts = set()
        for index, token_id in enumerate(ids):
            if token_id in self.added_ids:
                cuts |= {index, index + 1}
        return sorted({*(cuts - {0}), len(ids)})

    def _has_prefix(self, ids: Sequence[int], start: int, content: bytes, position: int) -> bool:
        """Whether the tokenizer put a space before the stretch that begins there."""
        if self.prefix is None or start == len(ids) or ids[start] in self.added_ids:
            return False
        if self.prefix.place == "text" and start > 0:
            return False
        return not (self.prefix.spares_spaces and content[position : position + 1] == b" ")


def _read_byte_level(model: Mapping[str, Any]) -> dict[int, bytes]:
    table = {}
    for token, token_id in model["vocab"].items():
        try:
            table[token_id] = byte_alphabet.token_bytes(token)
        except KeyError:  # a reserved token that no text produces
            table[token_id] = b""
    return table


def _read_pieces(model: Mapping[str, Any]) -> dict[int, bytes]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # unigram: [piece, score], by id
        vocabulary = {piece: token_id for token_id, (piece, _) in enumerate(vocabulary)}
    table = {}
    for piece, token_id in vocabulary.items():
        byte = _BYTE_PIECE.fullmatch(piece) if model.get("byte_fallback") else None
        text = piece.replace(SPACE_SYMBOL, " ")
        table[token_id] = bytes.fromhex(byte[1]) if byte else text.encode("utf-8", "surrogatepass")
    unknown = model.get("unk_token")
    for token_id in (vocabulary.get(unknown), model.get("unk_id")):
        if token_id is not None:
            table[token_id] = b""  # what it stands for is not known
    return table


def _find_prefix(
    rewrites: Sequence[Mapping[str, Any]], splits: Sequence[Mapping[str, Any]]
) -> DummyPrefix | None:
    if any(step["type"] == "Prepend" and step["prepend"] in (SPACE_SYMBOL, " ") for step in rewrites):
        return DummyPrefix("stretch", spares_spaces=False)
    are_spaces_gone = any(
        step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE_SYMBOL
        for step in rewrites
    )
    for step in splits:
        if step["type"] == "Metaspace":
            scheme = step.get("prepend_scheme", "always")
            if scheme == "never":
                continue
            # A space put before a text without one is another way to put it everywhere.
            spares = not (step["replacement"] == " " and are_spaces_gone)
            return DummyPrefix("text" if scheme == "first" else "stretch", spares)
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            return DummyPrefix("stretch", spares_spaces=True)
    return None
