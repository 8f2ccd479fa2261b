"""Tokens with loss are counted the same in preparation and in training."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.dataset.labels import count_loss_tokens, split_signed, without_first_tokens
from colossal_llama.training.data.collator import Collator
from colossal_llama.training.data.rows import Row

rows = st.lists(st.lists(st.booleans(), min_size=1, max_size=5), min_size=1, max_size=5)


class OneRow:
    def __init__(self, row: Row) -> None:
        self.row = row

    def __getitem__(self, index: int) -> Row:
        return self.row


@given(rows)
def test_the_count_is_that_of_the_collator(documents: list[list[bool]]) -> None:
    lengths = np.array([len(document) for document in documents], dtype=np.int32)
    ids = np.arange(lengths.sum(), dtype=np.int32)
    labels = np.where([label for document in documents for label in document], ids, -100).astype(np.int32)
    row = Row(ids, labels, lengths)
    batch = Collator(OneRow(row), 0, None, True, 100)([0])
    count = sum(label for document in documents for label in document[1:])
    assert count_loss_tokens(labels, lengths) == count == int((batch["labels"] != -100).sum())


def test_labels_stay_as_they_are() -> None:
    labels = np.array([5, 6, 7, 8], dtype=np.int32)
    lengths = np.array([1, 0, 3])
    assert without_first_tokens(labels, lengths).tolist() == [-100, -100, 7, 8]
    assert labels.tolist() == [5, 6, 7, 8]


def test_split_signed() -> None:
    input_ids, labels = split_signed(np.array([~1, ~0, 0, 7], dtype=np.int32))
    assert input_ids.tolist() == [1, 0, 0, 7]
    assert labels.tolist() == [-100, -100, 0, 7]
    assert input_ids.dtype == labels.dtype == np.int32
