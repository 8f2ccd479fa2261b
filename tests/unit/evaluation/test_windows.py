"""Every token counts once, and no window shows a model more bytes than another tokenizer's would."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.evaluation.windows import (
    EncodedDocument,
    Window,
    cut_documents,
    cut_windows,
    ends_by_offsets,
    make_batches,
)

BOS, EOS = 1001, 1002


def make_document(lengths: list[int], num_source_bytes: int = 0) -> EncodedDocument:
    """Tokens 0, 1, 2, … of so many bytes each."""
    return EncodedDocument(np.arange(len(lengths)), np.cumsum(lengths, dtype=np.int64), num_source_bytes)


def test_the_drawing() -> None:
    windows = cut_windows(7, make_document([4, 1, 4, 3, 2]), BOS, EOS, context_bytes=8, stride_bytes=4)
    assert [(window.ids.tolist(), window.num_scored) for window in windows] == [
        ([BOS, 0, 1], 2),
        ([BOS, 1, 2, 3], 2),
        ([BOS, 3, 4, EOS], 2),
    ]
    assert {window.document for window in windows} == {7}


@given(
    lengths=st.lists(st.integers(0, 9), max_size=40),
    context=st.integers(1, 30),
    stride=st.integers(1, 30),
    source=st.integers(0, 40),
)
def test_every_token_counts_once(lengths: list[int], context: int, stride: int, source: int) -> None:
    stride = min(stride, context)
    source = min(source, sum(lengths))
    document = make_document(lengths, source)
    windows = cut_windows(0, document, BOS, EOS, context, stride)
    scored = [token for window in windows for token in window.ids[-window.num_scored :].tolist()]
    expected = [token for token, end in enumerate(document.ends) if end > source or not source]
    assert scored == [*expected, EOS]
    starts = document.ends - np.array(lengths, dtype=np.int64)
    for window in windows:
        assert window.ids[0] == BOS
        assert window.num_scored > 0
        tokens = [token for token in window.ids[1:].tolist() if token != EOS]
        assert tokens == list(range(tokens[0], tokens[0] + len(tokens))) if tokens else True
        num_scored = window.num_scored - (window.ids[-1] == EOS)
        counted = tokens[len(tokens) - num_scored :]
        if counted:  # the first that counts may reach into the window from before it
            before = max(0, min(document.ends[counted[-1]], sum(lengths)) - context - starts[counted[0]])
            assert document.ends[counted[-1]] - starts[tokens[0]] <= context + before
            assert before <= lengths[counted[0]]


def test_a_short_document_is_one_window_and_a_prefix_counts() -> None:
    """The dummy prefix as a token of its own has no bytes, and a loss."""
    (window,) = cut_windows(0, make_document([0, 3, 3]), BOS, EOS, 8192, 4096)
    assert (window.ids.tolist(), window.num_scored) == ([BOS, 0, 1, 2, EOS], 4)
    (window,) = cut_windows(0, make_document([0, 3, 3], num_source_bytes=3), BOS, EOS, 8192, 4096)
    assert (window.ids.tolist(), window.num_scored) == ([BOS, 0, 1, 2, EOS], 2)
    (window,) = cut_windows(0, make_document([]), BOS, EOS, 8192, 4096)
    assert (window.ids.tolist(), window.num_scored) == ([BOS, EOS], 1)


def test_a_long_source_is_context_alone() -> None:
    windows = cut_documents([make_document([4] * 10, num_source_bytes=30)], BOS, EOS, 8, 4)
    assert [(window.ids.tolist(), window.num_scored) for window in windows] == [
        ([BOS, 6, 7], 1),  # token 7 reaches over the border, and counts
        ([BOS, 7, 8], 1),
        ([BOS, 8, 9, EOS], 2),
    ]


def test_ends_by_characters() -> None:
    assert ends_by_offsets("é人a", [1, 2, 2, 3]).tolist() == [2, 5, 5, 6]
    assert ends_by_offsets("ab ", [1, 2]).tolist() == [1, 3]  # what was cut off belongs to the last
    assert ends_by_offsets("ab", [2, 1]).tolist() == [2, 2]
    assert ends_by_offsets("", []).tolist() == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 200))
def test_batches_have_windows_of_about_a_length(lengths: list[int], max_tokens: int) -> None:
    windows = [Window(0, np.zeros(length, dtype=np.int32), 1) for length in lengths]
    batches = make_batches(windows, max_tokens)
    assert sorted(itertools.chain(*batches)) == list(range(len(windows)))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_tokens
    in_order = [lengths[number] for number in itertools.chain(*batches)]
    assert in_order == sorted(lengths, reverse=True)


@pytest.mark.parametrize("size", [1, 3, 8, 9, 100])
def test_bytes_of_the_windows_are_those_of_the_text(size: int) -> None:
    document = make_document([1] * size)
    windows = cut_windows(0, document, BOS, EOS, 8, 3)
    assert sum(window.num_scored for window in windows) == size + 1
