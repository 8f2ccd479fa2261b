"""Which tokens end an answer, found in rows that do not say."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from colossal_llama.training.data.answer_ends import ends_of_spans, find_answer_ends
from colossal_llama.training.data.prepared_rows import Row

WORDS = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "<|im_end|>",
    4: "</think>",
    5: "<tool>",
    10: "Hi",
    11: "!",
    12: "\n",
    13: "  ",
    14: "",
}
SPECIAL, ORDINARY = (0, 1, 2, 3), (4, 5)


def make_tokenizer(special: tuple[int, ...] = SPECIAL, bos: int = 1) -> Any:
    return SimpleNamespace(
        added_tokens_decoder={
            i: SimpleNamespace(content=WORDS[i], special=i in special) for i in (*SPECIAL, *ORDINARY)
        },
        bos_token_id=bos,
        eos_token_id=2,
        unk_token_id=0,
        decode=lambda ids: "".join(WORDS[i] for i in ids),
    )


def make_row(*documents: list[int]) -> Row:
    """Documents of tokens; a negative number is a token without loss."""
    flat = np.array([token for document in documents for token in document])
    ids, labels = np.where(flat < 0, ~flat, flat), np.where(flat < 0, -100, flat)
    return Row(ids, labels, np.array([len(document) for document in documents]))


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ([[~1, ~10, 10, 11, 2]], {2}),
        ([[~1, 10, 2, ~10, 10, 11, 3, ~10]], {2, 3}),
        ([[~1, 10, 3, 12]], {3}),  # the template's line break belongs to the answer
        ([[~1, 10, 3, 12, 13, 14, ~10]], {3}),
        ([[~1, 10, 3], [10, 2], [1, 10]], {2, 3}),  # documents without a label between them
        ([[~1, 10, 11]], set()),
        ([[~10, 12, ~3]], set()),  # the end itself has no loss: the model never says it
        ([[~1, ~10, ~2]], set()),
        ([[1], [1]], set()),  # a beginning is no end
        ([[0]], set()),
        ([[~1, 10, 4], [~1, 10, 11], [~1, 11, 11]], set()),  # of the answer itself, now and then
        ([[~1, 10, 5], [~1, 10, 5, 12], [~1, 11, 11]], {5}),  # mostly: an end that is not marked special
    ],
)
def test_ends_of_spans(documents: list[list[int]], expected: set[int]) -> None:
    assert ends_of_spans([make_row(*documents)], make_tokenizer()) == expected
    assert ends_of_spans([make_row(document) for document in documents], make_tokenizer()) == expected


def test_an_end_may_be_the_beginning_too() -> None:
    assert ends_of_spans([make_row([~2, ~10, 10, 2])], make_tokenizer(bos=2)) == {2}


def test_no_rows() -> None:
    assert ends_of_spans([], make_tokenizer()) == set()


class Parts(list):
    """Rows of several parts, two a part."""

    def __init__(self, paths: list[Path], rows: list[Row]) -> None:
        super().__init__(rows)
        self.paths, self.starts = paths, np.arange(len(paths) + 1) * 2


@pytest.mark.parametrize(
    ("prepared", "expected"),
    [
        ([{"kind": "pretrain"}, {"kind": "pretrain"}], None),
        ([{"kind": "sft", "end_of_turn_ids": [5]}, {"kind": "pretrain"}], [5]),
        ([{"kind": "sft", "end_of_turn_ids": [5]}, {"kind": "sft"}], [3, 5]),
        ([{"kind": "sft"}, {"kind": "sft"}], [2, 3]),
        ([None, {"kind": "pretrain"}], [2]),
    ],
)
def test_parts_say_it_or_their_rows_do(tmp_path: Path, prepared: list, expected: list | None) -> None:
    paths = [tmp_path / str(number) for number in range(len(prepared))]
    for path, content in zip(paths, prepared, strict=True):
        path.mkdir()
        if content is not None:
            (path / "prepared.json").write_text(json.dumps(content))
    rows = [make_row([~1, 10, 2]), make_row([~1, 10, ~11]), make_row([~1, 10, 3]), make_row([~1, 10, 3])]
    assert find_answer_ends(Parts(paths, rows), make_tokenizer()) == expected
