"""What an engine does, and what the encoders of records use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Engine(Protocol):
    """Encodes texts as they are: nothing added, cut or padded; special tokens' strings are plain text."""

    def __init__(self, tokenizer_json: str) -> None: ...

    def encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """The ids of each text, as a list or an array."""


class TextEncoder(Protocol):
    """What the encoders of records use: an engine that also knows where a token ends in its text."""

    def encode(self, texts: Sequence[str]) -> Iterable[Sequence[int]]:
        """The ids of each text, as a list or an array."""

    def encode_with_borders(
        self, texts: Sequence[str], positions: Sequence[int]
    ) -> Iterable[tuple[Sequence[int], int]]:
        """The same ids, and how many tokens come before the first that ends beyond a position of the text.

        Args:
            positions: numbers of characters, at least 1, one for each text.
        """
