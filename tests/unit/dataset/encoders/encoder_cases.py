"""Texts and checks that the tests of several encoders share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from colossal_llama.dataset.encoders.base import Outcome
from colossal_llama.dataset.labels import split_signed

SNIPPETS = [
    "river ",
    " The",
    "人工智能",
    "。",
    "\n",
    "  ",
    "</s>",
    "<|eot_id|>",
    "<s>",
    "é",
    "🌊",
    "x",
    "1,250",
    "▁",
    "\u200b",
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=8).map("".join)
no_surrogates = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
MakeEncoder = Callable[..., Any]


def encode_slowly(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return encoding["input_ids"], encoding["offset_mapping"]


def joined(outcome: Outcome) -> tuple[list[int], list[int]]:
    input_ids, labels = split_signed(np.concatenate(outcome.pieces))
    return input_ids.tolist(), labels.tolist()


def check_accounts(outcome: Outcome) -> None:
    num_kept = sum(len(piece) for piece in outcome.pieces)
    assert outcome.num_tokens == num_kept + sum(outcome.dropped_tokens.values())
    assert bool(outcome.pieces) == (outcome.reason is None)
