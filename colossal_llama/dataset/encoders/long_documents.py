"""What becomes of documents that are longer than a row: the choices of `--long_documents`.

Each is a function of the stored tokens (see `labels`) and the row's length, and is called only for documents
that do not fit.
"""

from __future__ import annotations

import numpy as np

from colossal_llama.dataset.encoders.base import Outcome
from colossal_llama.dataset.labels import has_loss


def truncate(stored: np.ndarray, max_length: int) -> Outcome:
    """The beginning, as much as a row holds; without loss in it, the document is dropped."""
    kept, num_cut = stored[:max_length], len(stored) - max_length
    if not has_loss(kept):
        reason = "no label in the part kept"
        return Outcome(len(stored), dropped_tokens={reason: len(stored)}, reason=reason)
    return Outcome(len(stored), [kept], {"beyond max_length": num_cut}, notes=["truncated"])


def chunk(stored: np.ndarray, max_length: int) -> Outcome:
    """Full rows and a remainder, BOS in the first, EOS in the last; a chunk without loss is dropped."""
    outcome = Outcome(len(stored), notes=["chunked"])
    start = 0
    while start < len(stored):
        end = _end_ofchunk(stored, start, max_length)
        chunk = stored[start:end]
        if has_loss(chunk):
            outcome.pieces.append(chunk)
        else:
            reason = "chunk without label"
            outcome.dropped_tokens[reason] = outcome.dropped_tokens.get(reason, 0) + len(chunk)
        start = end
    if not outcome.pieces:
        outcome.reason = "chunk without label"
    return outcome


def _end_ofchunk(stored: np.ndarray, start: int, max_length: int) -> int:
    """Where the chunk that begins at `start` ends.

    The first token of a row has no loss. When it is the only label of the next chunk (a remainder of one
    token, most often), this chunk leaves it a token; and all that it can take, where this chunk has no loss
    without that token and would be dropped:

        rows of 4    a b c d | e          a b c | d e          the label is e's
                    ~a~b~c d | e         ~a | ~b~c d e         ~ is without label
    """
    end = min(start + max_length, len(stored))
    following = stored[end : end + max_length]
    if not len(following) or following[0] < 0 or has_loss(following):
        return end
    return end - 1 if has_loss(stored[start : end - 1]) else end + 1 - max_length
