"""Opens a tokenizer that is to be extended, whichever of the two kinds it is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from colossal_llama.tokenizer.extension import VocabularyExtension
from colossal_llama.tokenizer.pieces_file import ListedPieces, PieceRules
from colossal_llama.tokenizer.tokenizer_files import TokenizerFiles, read_tokenizer_files


class ExtensibleSource(Protocol):
    """What both kinds of source tokenizer can do."""

    files: TokenizerFiles

    @property
    def rules(self) -> PieceRules:
        """What can be a new piece."""

    def extend(self, listed: ListedPieces, unreachable_mode: str) -> VocabularyExtension:
        """Works out the new vocabulary; raises `UserError` for `unreachable_mode` "error"."""

    def vocabulary_files(self, extension: VocabularyExtension) -> dict[str, bytes]:
        """The vocabulary files of the extended tokenizer: name -> content."""


def open_source(directory: Path, flag: str) -> ExtensibleSource:
    """Opens a LLaMA-2 style (sentencepiece) or LLaMA-3 style (byte-level) tokenizer directory.

    Args:
        flag: the command-line flag that named it, for messages.

    Raises:
        UserError: it is neither, or can't be extended without changing what it does.
    """
    files = read_tokenizer_files(directory, flag)
    if files.is_sentencepiece:
        from colossal_llama.tokenizer.sentencepiece_extension import SentencePieceSource

        return SentencePieceSource(files)
    from colossal_llama.tokenizer.byte_level_extension import ByteLevelSource

    return ByteLevelSource(files)
