"""What encodes texts with a serialised tokenizer, one engine in one file each (`--tokenizer_engine`).

A new engine is a class with the methods of `Engine` in a file of its own, and a line here. Its ids must be
those of the Hugging Face library, or the data fits no model: it is tried out before it is used (`trial`) and
checked while it works (`checked`). Nothing that is written depends on which one encodes.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from colossal_llama.utils.registry import look_up

if TYPE_CHECKING:
    from colossal_llama.dataset.engines.base import TextEncoder

REFERENCE = "hf"
ENGINES = {
    REFERENCE: "colossal_llama.dataset.engines.huggingface:TokenizersEngine",
    "tuetoken": "colossal_llama.dataset.engines.tuetoken:TuetokenEngine",
}
# Engine -> versions of the package of that name that the tests run with; `auto` takes no other.
TESTED_VERSIONS = {"tuetoken": ("0.1.3",)}


def installed_version(name: str) -> str | None:
    """The version of an engine's package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def load_reference(tokenizer_json: str) -> TextEncoder:
    """The reference for the tokenizer in a file."""
    return load_engine(REFERENCE, tokenizer_json)


def load_engine(name: str, tokenizer_json: str, engine_json: str = "") -> TextEncoder:
    """The engine of this name for the tokenizer in a file, checked while it works; loaded once a process.

    Args:
        engine_json: the same tokenizer as the engine reads it; "" for the same file.
    """
    files = [tokenizer_json, engine_json or tokenizer_json]
    return _load_engine(name, *files, tuple((s.st_mtime_ns, s.st_size) for s in map(os.stat, files)))


@lru_cache(maxsize=2)  # the reference, and an engine beside it
def _load_engine(
    name: str, tokenizer_json: str, engine_json: str, versions: tuple[tuple[int, int], ...]
) -> TextEncoder:
    if name == REFERENCE:
        return look_up(ENGINES, REFERENCE)(tokenizer_json)
    from colossal_llama.dataset.engines.checked import CheckedEngine

    engine = look_up(ENGINES, name)(engine_json)
    return CheckedEngine.of_file(name, engine, load_reference(tokenizer_json), tokenizer_json)
