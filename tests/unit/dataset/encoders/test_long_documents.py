"""Every chunk has loss, whatever the mask."""

from __future__ import annotations

import numpy as np
from encoder_cases import check_accounts
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.encoders import long_documents


def chunk_by_rule(labels: list[bool], max_length: int) -> list[tuple[int, int]]:
    """Bounds of all chunks, dropped ones too: full rows, unless the next one's only label came first."""
    bounds, start = [], 0
    while start < len(labels):
        end = min(start + max_length, len(labels))
        following = labels[end : end + max_length]
        if following[:1] == [True] and not any(following[1:]):
            end = end - 1 if any(labels[start + 1 : end - 1]) else end + 1 - max_length
        bounds.append((start, end))
        start = end
    return bounds


@given(labels=st.lists(st.booleans(), min_size=1, max_size=40), max_length=st.integers(2, 9))
def test_every_chunk_has_loss(labels: list[bool], max_length: int) -> None:
    """Any mask, though those of pre-training end with a run of labels."""
    ids = np.arange(len(labels), dtype=np.int32)
    stored = np.where(labels, ids, ~ids).astype(np.int32)
    outcome = long_documents.chunk(stored, max_length)
    check_accounts(outcome)
    bounds = chunk_by_rule(labels, max_length)
    assert [i for start, end in bounds for i in range(start, end)] == ids.tolist()
    kept = [(start, end) for start, end in bounds if any(labels[start + 1 : end])]
    assert [piece.tolist() for piece in outcome.pieces] == [stored[a:b].tolist() for a, b in kept]
    for piece in outcome.pieces:
        assert len(piece) <= max_length
        assert (piece[1:] >= 0).any()


@given(num_tokens=st.integers(2, 60), num_without=st.integers(1, 59), max_length=st.integers(2, 9))
def test_only_a_remainder_of_one_token_takes_from_the_chunk_before(
    num_tokens: int, num_without: int, max_length: int
) -> None:
    """Pre-training's masks: nothing up to some token, everything after it."""
    ids = np.arange(num_tokens, dtype=np.int32)
    stored = np.where(ids < min(num_without, num_tokens - 1), ~ids, ids).astype(np.int32)
    outcome = long_documents.chunk(stored, max_length)
    sizes = [len(piece) for piece in outcome.pieces]
    assert outcome.pieces[-1][-1] == num_tokens - 1  # EOS
    if num_tokens % max_length != 1:
        assert sizes[:-1] == [max_length] * (len(sizes) - 1)
    elif max_length > 2:
        assert sizes[:-2] == [max_length] * (len(sizes) - 2)
        assert sizes[-2:] in ([max_length - 1, 2], [max_length])
        # What is lost: source that fills its rows, and a token or none of the rows with labels.
        num_dropped = sum(outcome.dropped_tokens.values())
        assert num_dropped % max_length in (0, 1)
