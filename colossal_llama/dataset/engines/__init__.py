"""What encodes texts with a serialised tokenizer, one engine in one file each (`--tokenizer_engine`).

A new engine is a class with the methods of `Engine` in a file of its own, and a line here. Its ids must be
those of the Hugging Face library, or the data fits no model: it is tried out before it is used (`trial`) and
checked while it works (`checked`). Nothing that is written depends on which one encodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

from colossal_llama.utils.registry import look_up

REFERENCE = "hf"
ENGINES = {
    REFERENCE: "colossal_llama.dataset.engines.huggingface:TokenizersEngine",
    "tuetoken": "colossal_llama.dataset.engines.tuetoken:TuetokenEngine",
}
# Engine -> versions of the package of that name that the tests run with; `auto` takes no other.
TESTED_VERSIONS = {"tuetoken": ("0.1.3",)}


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


def installed_version(name: str) -> str | None:
    """The version of an engine's package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load_engine(name: str, tokenizer_json: str, engine_json: str = "") -> TextEncoder:
    """The engine of this name for the tokenizer in a file, checked while it works.

    Args:
        engine_json: the same tokenizer as the engine reads it; "" for the same file.
    """
    reference = look_up(ENGINES, REFERENCE)(tokenizer_json)
    if name == REFERENCE:
        return reference
    from colossal_llama.dataset.engines.checked import CheckedEngine

    engine = look_up(ENGINES, name)(engine_json or tokenizer_json)
    return CheckedEngine.of_file(name, engine, reference, tokenizer_json)
