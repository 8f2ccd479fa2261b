"""Which tokens have loss: what preparation, its statistics and the loader all have to agree on.

The first token of a document never has loss, whatever its label is: nothing predicts it.
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
    """Whether a piece has a token with loss; `stored` as in `tokenization`: below zero is without label."""
    return bool((stored[1:] >= 0).any())
