"""Tells whether two tokenizers mean the same by every id."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over every (token, id) pair, added tokens included, and the ids of BOS and EOS."""
    digest = hashlib.sha256()
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{token_id}\0{token}\n".encode("utf-8", "surrogatepass"))
    digest.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    return digest.hexdigest()[:16]
