"""Held-out text: which records `--held_out_share` keeps out of training."""

from __future__ import annotations

import hashlib

HASH_BYTES = 8


def is_held_out(text: str, share: float) -> bool:
    """Whether a record with this text is held out; decided by its hash alone.

    Equal texts fall on the same side, in every data set, with every tokenizer and seed; what a share holds
    out, a larger one holds out too.
    """
    if share <= 0:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") < share * 2 ** (8 * HASH_BYTES)
