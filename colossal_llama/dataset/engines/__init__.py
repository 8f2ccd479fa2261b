"""What encodes texts with a serialised tokenizer, one engine in one file each.

A new engine is a class with the methods of `Engine` in a file of its own, and a line here. Its ids must be
those of the tokenizer, or the data fits no model; its name is a part of what decides a shard's content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from colossal_llama.utils.registry import look_up

ENGINES = {"tokenizers": "colossal_llama.dataset.engines.huggingface:TokenizersEngine"}


class OffsetEncoding(Protocol):
    """A text's tokens and where they come from.

    Attributes:
        ids: the tokens.
        offsets: the half-open span of characters of each token.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    def __len__(self) -> int: ...

    def char_to_token(self, position: int) -> int | None:
        """Index of the token that holds a character, if one does."""


class Engine(Protocol):
    """Encodes texts as they are: nothing added, cut or padded; special tokens' strings are plain text."""

    def __init__(self, tokenizer_json: str) -> None: ...

    def encode(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """The ids of each text."""

    def encode_with_offsets(self, texts: Sequence[str]) -> Iterable[OffsetEncoding]:
        """The same ids with offsets, which cost a part of the speed."""


def load_engine(name: str, tokenizer_json: str) -> Engine:
    """The engine of this name for the tokenizer in a file."""
    return look_up(ENGINES, name)(tokenizer_json)
