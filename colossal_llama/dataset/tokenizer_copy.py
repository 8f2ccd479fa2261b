"""The tokenizer of a preparation: loaded once, and copied for the workers."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.conversation.stretches import follow_special_tokens
from colossal_llama.dataset.engines import load_reference
from colossal_llama.tokenizer.fingerprint import tokenizer_fingerprint
from colossal_llama.tokenizer.tokenizer_files import check_settings
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import with_filename_in_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_NAME = re.compile(r"[0-9a-f]{24}(-\w+)?\.json")


@dataclass(frozen=True)
class TokenizerInfo:
    """What the bins say about the tokenizer that made them."""

    json_path: Path
    fingerprint: str
    vocab_size: int


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face directory; `UserError` when there is none, or no BOS or EOS."""
    from transformers import AutoTokenizer

    check_settings(directory)
    try:
        # Not left open: transformers would ask standard input whether to run the directory's code.
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library has no exception types of its own
        raise UserError(f"--tokenizer_dir {directory}: no tokenizer can be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--tokenizer_dir {directory}: {type(tokenizer).__name__} is not a fast tokenizer")
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(
                f"--tokenizer_dir {directory}: the tokenizer has no {name}; set it in its configuration"
            )
    return tokenizer


def save_tokenizer(
    tokenizer: PreTrainedTokenizerFast, cache_dir: Path, follows_special_tokens: bool = False
) -> Path:
    """Serialises the Rust tokenizer for the workers, under a name that stands for its content.

    Args:
        follows_special_tokens: whether every text that is encoded stands behind a special token.

    Returns:
        The absolute path.
    """
    directory = cache_dir / "tokenizer"
    directory.mkdir(parents=True, exist_ok=True)
    text = tokenizer.backend_tokenizer.to_str()
    if follows_special_tokens:
        text = follow_special_tokens(text)
    path = directory / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
    for other in directory.iterdir():
        if TOKENIZER_NAME.fullmatch(other.name) and not other.name.startswith(path.stem):
            other.unlink()
    with with_filename_in_errors(path):
        path.write_text(text, encoding="utf-8")
    return path.absolute()


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> TokenizerInfo:
    """What the bins say about the tokenizer that `save_tokenizer` wrote there."""
    return TokenizerInfo(path, tokenizer_fingerprint(tokenizer), len(tokenizer))


@dataclass(frozen=True)
class SpecialTokens:
    """Those of a tokenizer: (id, content), without the unknown token, which may stand for any character."""

    tokenizer_json: str
    tokens: tuple[tuple[int, str], ...]

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerFast, path: Path) -> SpecialTokens:
        found = tokenizer.added_tokens_decoder.items()
        special = [(token_id, token.content) for token_id, token in found if token.special]
        return cls(str(path), tuple(token for token in special if token[0] != tokenizer.unk_token_id))


def find_merged_tokens(special: SpecialTokens) -> list[tuple[int, str]]:
    """The special tokens that plain text becomes, by merges alone."""
    engine = load_reference(special.tokenizer_json)
    encoded = engine.encode([f"{content} a{content}" for _, content in special.tokens])
    return [token for token, ids in zip(special.tokens, encoded, strict=True) if token[0] in ids]
