"""Which tokens end an answer in prepared data: what a model trained on it says when it has finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.conversation.control_tokens import is_mark
from colossal_llama.dataset.bins import END_IDS_KEY
from colossal_llama.dataset.labels import NO_LOSS_LABEL
from colossal_llama.training.data.prepared_rows import PREPARED_FILE, PreparedDataset
from colossal_llama.training.data.rows import Row
from colossal_llama.utils.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Rows that are looked at, spread over the parts that do not say what ends their answers.
MAX_ROWS = 4096
# An answer may itself end with an ordinary added token ("</think>"); an end of turn follows every answer.
ORDINARY_SHARE = 0.5


def find_answer_ends(data: PreparedDataset, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Ids of the tokens that end answers, ascending; None when all of the data is for pre-training.

    Parts name them in `prepared.json`; in others (earlier versions, `--chat_template`, other programs) they
    are found in the rows.
    """
    ends: set[int] = set()
    unstated = []
    is_tuning = False
    for number, path in enumerate(data.paths):
        file = path / PREPARED_FILE
        prepared = read_json(file) if file.is_file() else {}
        if prepared.get("kind") == "pretrain":
            continue
        is_tuning = True
        if END_IDS_KEY in prepared:
            ends.update(prepared[END_IDS_KEY])
        else:
            unstated.append(number)
    for number in unstated:
        first, end = int(data.starts[number]), int(data.starts[number + 1])
        num_rows = min(end - first, max(1, MAX_ROWS // len(unstated)))
        rows = np.linspace(first, end - 1, num_rows, dtype=np.int64)
        ends |= ends_of_spans([data[row] for row in rows.tolist()], tokenizer)
    return sorted(ends) if is_tuning else None


def ends_of_spans(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Control tokens that end stretches with loss, whitespace after them not counted.

    labels    -100 -100  Hi  !  <|im_end|>  \\n  -100 -100
                         ─────────────────  ──
                         the answer         of the template: passed over
    """
    no_ends = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    marks = {
        token_id: token.special
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token.special or is_mark(token.content)) and token_id not in no_ends
    }
    is_space: dict[int, bool] = {}

    def is_whitespace(token_id: int) -> bool:
        if token_id not in is_space:
            is_space[token_id] = token_id not in marks and not tokenizer.decode([token_id]).strip()
        return is_space[token_id]

    counts: Counter[int] = Counter()
    num_spans = 0
    for row in rows:
        labels = np.asarray(row.labels)
        has_loss = labels != NO_LOSS_LABEL
        is_last = has_loss.copy()
        is_last[:-1] &= ~has_loss[1:]
        is_last[np.cumsum(row.document_lengths) - 1] |= has_loss[np.cumsum(row.document_lengths) - 1]
        for position in np.flatnonzero(is_last).tolist():
            num_spans += 1
            while position >= 0 and has_loss[position] and is_whitespace(int(labels[position])):
                position -= 1
            if position >= 0 and has_loss[position] and int(labels[position]) in marks:
                counts[int(labels[position])] += 1
    return {
        token_id
        for token_id, count in counts.items()
        if marks[token_id] or count >= ORDINARY_SHARE * num_spans
    }
