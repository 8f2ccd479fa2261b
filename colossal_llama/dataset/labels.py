"""Which tokens have loss: what preparation, its statistics and the loader all have to agree on.

The first token of a document never has loss, whatever its label is: nothing predicts it.

In preparation, a document is one int32 array. A token without loss is stored as the bitwise complement of its
id, so ids and labels travel together and chunking is slicing:

    source "a b", target "c"     BOS  a  b  c EOS      ids
                                  ~1 ~5 ~6  7   2      stored: `~id` is below zero
                                -100 … …    7   2      labels
"""

from __future__ import annotations

import numpy as np

NO_LOSS_LABEL = -100


def without_first_tokens(labels: np.ndarray, document_lengths: np.ndarray) -> np.ndarray:
    """A copy of a row's labels (or of several rows' together), -100 at the first token of each document."""
    starts = np.cumsum(document_lengths, dtype=np.int64) - document_lengths
    labels = labels.copy()
    labels[starts[document_lengths > 0]] = NO_LOSS_LABEL
    return labels


def count_loss_tokens(labels: np.ndarray, document_lengths: np.ndarray) -> int:
    """Number of tokens with loss in rows of these documents.

    Args:
        labels: int array [tokens], -100 where a token has no loss; not shifted.
        document_lengths: int array [documents], summing to the tokens.
    """
    return int((without_first_tokens(labels, document_lengths) != NO_LOSS_LABEL).sum())


def has_loss(stored: np.ndarray) -> bool:
    """Whether a piece has a token with loss; `stored` as drawn above: below zero is without label."""
    return bool((stored[1:] >= 0).any())


def split_signed(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(input_ids, labels)` of stored tokens, int32 arrays of the same shape."""
    input_ids = stored ^ (stored >> 31)  # ~x where x is below zero
    labels = np.where(stored < 0, np.int32(NO_LOSS_LABEL), stored)
    return input_ids, labels
