"""Rows as a person reads them: nothing is missing, and no character of theirs controls the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from colossal_llama.dataset.preview import OFF, Preview


@pytest.fixture
def rows(llama2_tokenizer_dir: Path) -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    first = [1, *ids("The river </s>"), 2]
    source, target = ids("Where?"), ids("长 \x1b[31m\nhere")
    second = [1, *source, *target, 2]
    labels = [*first, *[-100] * (1 + len(source)), *target, 2]
    return tokenizer, np.array(first + second), np.array(labels), np.array([len(first), len(second)])


def test_documents_loss_and_special_tokens(rows: tuple) -> None:
    tokenizer, ids, labels, lengths = rows
    text = Preview(tokenizer, coloured=False).show_row(ids, labels, lengths)
    first, second, third = text.split("\n")
    assert first == "<s>⟦ The river </s></s>⟧"  # one is text, one is the token
    assert second == "<s> Where?⟦ 长 \\x1b[31m"
    assert third == "here</s>⟧"


def test_special_tokens_without_a_role(llama3_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    bos, end = tokenizer.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"])
    assert end not in tokenizer.all_special_ids
    ids = np.array([bos, *tokenizer("Here", add_special_tokens=False)["input_ids"], end])
    text = Preview(tokenizer, coloured=False).show_row(
        ids, np.where(ids == bos, -100, ids), np.array([len(ids)])
    )
    assert text == "<|begin_of_text|>⟦Here<|eot_id|>⟧"


def test_colours(rows: tuple) -> None:
    tokenizer, ids, labels, lengths = rows
    text = Preview(tokenizer, coloured=True).show_row(ids, labels, lengths)
    first, second, _ = text.split("\n")
    assert first == (
        f"\033[2;36;7m<s>{OFF}⟦\033[1;36m The river </s>{OFF}\033[1;36;7m</s>{OFF}⟧"  # the token is reversed
    )
    assert second.startswith(f"\033[2;33;7m<s>{OFF}\033[2;33m Where?{OFF}⟦\033[1;33m 长 ")


def test_rows_of_all_parts(rows: tuple, tmp_path: Path) -> None:
    tokenizer, ids, labels, lengths = rows
    row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "document_lengths": lengths.tolist()}
    parts = [tmp_path / "part-00000", tmp_path / "part-00001"]
    for part, count in zip(parts, (1, 3), strict=True):
        Dataset.from_list([row] * count).save_to_disk(part)
    preview = Preview(tokenizer, coloured=False)
    shown = [text.splitlines()[0] for text in preview.show(parts, 3, 256)]
    assert shown == [
        f"── {name}, row {index}: {len(ids)} of 256 tokens, 2 documents"
        for name, index in (("part-00000", 0), ("part-00001", 0), ("part-00001", 1))
    ]
    assert len(list(preview.show(parts, 9, 256))) == 4
