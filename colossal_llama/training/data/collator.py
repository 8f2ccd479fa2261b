"""From rows to the tensors of a micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from colossal_llama.dataset.labels import NO_LOSS_LABEL, without_first_tokens
from colossal_llama.training.data.rows import RowDataset, find_row_problem
from colossal_llama.utils.errors import UserError


class Collator:
    """Makes a batch of rows.

    Two rows, `max_length` 6; the first holds two documents of three and two tokens, the second one of
    three. Labels are shifted here: `labels[t]` is what position t has to predict, and nothing predicts a
    document's first token.

        input_ids        a b c d e .      f g h . . .
        labels           b c - e - -      g h - - - -        (- is -100; all other tokens have loss)
        position_ids     0 1 2 0 1 0      0 1 2 0 1 2
        document_index   0 0 0 1 1 -      0 0 0 - - -        (- is -1: padding is a document of its own)

    Args:
        pad_token_id: id that fills rows; it is never attended to by real tokens and never has loss.
        pad_to: every row gets this length; None pads to the longest row of the batch.
        multiple_of: the padded length is a multiple of this (sequence parallelism splits it evenly).
        isolate_documents: off, the documents of a row see each other and positions run on.
        vocab_size: of the model's embeddings; a token outside is an error.
    """

    def __init__(
        self,
        source: RowDataset,
        pad_token_id: int,
        pad_to: int | None,
        isolate_documents: bool,
        vocab_size: int,
        multiple_of: int = 1,
    ) -> None:
        self.source = source
        self.pad_token_id, self.pad_to, self.multiple_of = pad_token_id, pad_to, multiple_of
        self.isolate_documents, self.vocab_size = isolate_documents, vocab_size

    def __call__(self, rows: list[int | None]) -> dict[str, Any]:
        """Makes the batch; a `UserError` comes back as `problem`: a loader worker can't raise it as it is.

        Returns:
            `input_ids`, `labels`, `position_ids`, `document_index` [rows, length] and `row_index` [rows],
            all int64 (-1 for an empty row), `num_tokens` (padding not counted), `problem`.
        """
        try:
            return self._collate(rows)
        except UserError as error:
            return {"problem": str(error)}

    def _collate(self, rows: list[int | None]) -> dict[str, Any]:
        contents = [None if row is None else self.source[row] for row in rows]
        length = self.pad_to or max([1, *(len(c.input_ids) for c in contents if c is not None)])
        length = -(-length // self.multiple_of) * self.multiple_of
        shape = (len(rows), length)
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, NO_LOSS_LABEL, dtype=np.int64)
        position_ids = np.tile(np.arange(length, dtype=np.int64), (len(rows), 1))
        document_index = np.full(shape, -1, dtype=np.int64)
        for i, content in enumerate(contents):
            if content is None or len(content.input_ids) == 0:
                continue
            n = len(content.input_ids)
            if problem := find_row_problem(
                self.source, rows[i], content, self.vocab_size, self.isolate_documents
            ):
                raise UserError(problem)
            lengths = content.document_lengths if self.isolate_documents else np.array([n])
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
            input_ids[i, :n] = content.input_ids
            labels[i, : n - 1] = without_first_tokens(content.labels, lengths)[1:]
            position_ids[i, :n] -= np.repeat(starts, lengths)
            position_ids[i, n:] -= n
            document_index[i, :n] = np.repeat(np.arange(len(lengths)), lengths)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(position_ids),
            "document_index": torch.from_numpy(document_index),
            "row_index": torch.tensor([-1 if row is None else row for row in rows]),
            "num_tokens": sum(len(c.input_ids) for c in contents if c is not None),
            "problem": None,
        }
