"""Tells whether two tokenizers mean the same by every id."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over every (token, id) pair, added tokens included, and the ids of BOS and EOS."""
    vocabulary = tokenizer.get_vocab()
    pairs = sorted(zip(vocabulary.values(), vocabulary.keys(), strict=True))
    lines = [f"{token_id}\0{token}\n" for token_id, token in pairs]
    lines.append(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()[:16]
