"""Loads tokenizers with transformers, for every program of the suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.tokenizer.tokenizer_files import check_settings
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_pretrained_tokenizer(
    name: str | Path, complain: Callable[[Exception], str], trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, or of the hub; a fast one where there is one.

    Args:
        complain: the message, with flag and remedy, for what keeps transformers from loading it.
        trust_remote_code: run the directory's own code. False where the user has no choice: without an
            answer, transformers would ask on standard input.
        options: of `from_pretrained`.

    Raises:
        UserError: it cannot be loaded, or its settings are damaged (see `check_settings`).
    """
    from transformers import AutoTokenizer

    check_settings(name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # of tokenizers and sentencepiece too, which have classes of their own
        raise UserError(complain(error)) from None
