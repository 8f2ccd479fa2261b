"""Rows of a prepared data set as a person reads them (`--preview`).

── part-00000, row 0: 12 of 256 tokens, 2 documents
<s>⟦ The river⟧</s>            what has loss is in ⟦ ⟧, and bright in a terminal
<s>Where?⟦ Here</s>⟧           each document starts on a line of its own, in a colour of its own
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.dataset.labels import NO_LOSS_LABEL, without_first_tokens
from colossal_llama.tokenizer.token_bytes import TokenBytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

COLOURS = (36, 33, 32, 35, 34)
DIM, BRIGHT, REVERSED, OFF = 2, 1, 7, "\033[0m"
# What a terminal would obey instead of showing it; line ends and tabs are shown as they are.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Preview:
    """Shows rows in the tokens of a tokenizer.

    Args:
        coloured: with ANSI colours, which a file does not need.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, coloured: bool) -> None:
        self.tokenizer, self.coloured = tokenizer, coloured
        self._table = TokenBytes.of_tokenizer(tokenizer)
        # Of LLaMA-3's special tokens, `all_special_ids` has only those with a role: not <|eot_id|>.
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}

    def show(self, parts: Sequence[Path], num_rows: int, max_length: int) -> Iterator[str]:
        """The text of each row: of every part the first, then the second …, as many as are asked for."""
        for number, (part, index, row) in enumerate(_read_rows(parts)):
            if number == num_rows:
                return
            ids, labels, lengths = row
            documents = "1 document" if len(lengths) == 1 else f"{len(lengths)} documents"
            yield (
                f"── {part.name}, row {index}: {len(ids):,} of {max_length:,} tokens, {documents}\n"
                + self.show_row(ids, labels, lengths)
            )

    def show_row(self, ids: np.ndarray, labels: np.ndarray, document_lengths: np.ndarray) -> str:
        """A line or more for each document."""
        with_loss = without_first_tokens(labels, document_lengths) != NO_LOSS_LABEL
        lines = []
        bounds = np.concatenate(([0], np.cumsum(document_lengths)))
        for number, (start, end) in enumerate(pairwise(bounds)):
            colour = COLOURS[number % len(COLOURS)]
            spans = groupby(range(start, end), key=lambda index: bool(with_loss[index]))
            lines.append("".join(self._show_span(ids[list(span)], has, colour) for has, span in spans))
        return "\n".join(lines)

    def _show_span(self, ids: np.ndarray, has_loss: bool, colour: int) -> str:
        """Tokens that all have loss, or all have none."""
        style = BRIGHT if has_loss else DIM
        text = "".join(
            self._paint("".join(map(self._name, group)), style, colour, REVERSED)
            if is_special
            else self._paint(self._text(list(group)), style, colour)
            for is_special, group in groupby(ids.tolist(), key=self._special_ids.__contains__)
        )
        return f"⟦{text}⟧" if has_loss else text

    def _text(self, ids: list[int]) -> str:
        if self._table is None:
            text = self.tokenizer.decode(ids)
        else:
            contents = self._table.contents
            text = b"".join(contents[i] for i in ids).decode(errors="replace")
        return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)

    def _name(self, token_id: int) -> str:
        return self.tokenizer.convert_ids_to_tokens(token_id)

    def _paint(self, text: str, *codes: int) -> str:
        return f"\033[{';'.join(map(str, codes))}m{text}{OFF}" if self.coloured else text


def _read_rows(
    parts: Sequence[Path],
) -> Iterator[tuple[Path, int, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    import datasets

    opened = [datasets.load_from_disk(str(part)) for part in parts]
    for index in range(max(map(len, opened), default=0)):
        for part, rows in zip(parts, opened, strict=True):
            if index < len(rows):
                row = rows[index]
                columns = (np.array(row[name]) for name in ("input_ids", "labels", "document_lengths"))
                yield part, index, tuple(columns)  # type: ignore[misc]
