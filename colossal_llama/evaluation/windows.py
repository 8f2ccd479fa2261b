"""Documents cut into windows that a model sees, by bytes of text: no tokenizer sees more than another.

Context 8 bytes, stride 4, a text of 14 bytes in five tokens; `#` counts, `-` is context:

    bytes      0  1  2  3  4  5  6  7  8  9  10 11 12 13
    tokens     [a        ][b][c        ][d      ][e   ]
    window 1   ##########  ##                             up to byte 8: c ends beyond
    window 2               --  #########  #######         bytes 4 to 12
    window 3                              -------  #####  bytes 6 to 14: c begins before. EOS counts

A token counts in the window in which it ends, even if it begins before the window; the context is the whole
tokens before it that fit. Every window begins with BOS: a model that was trained on documents expects it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.evaluation.held_out_text import Document
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.utils.console import progress_bar
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

BATCH_TEXTS = 256


@dataclass(frozen=True)
class Window:
    """A stretch of tokens that a model sees at once.

    Attributes:
        document: its number.
        ids: BOS, context, tokens that count.
        num_scored: how many count, EOS included; they are the last ones.
    """

    document: int
    ids: np.ndarray
    num_scored: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document in the tokens of one model.

    Attributes:
        ids: of the whole text, without BOS and EOS.
        ends: where each token ends, in bytes of the text.
        num_source_bytes: up to where nothing counts.
    """

    ids: np.ndarray
    ends: np.ndarray
    num_source_bytes: int


class TextEncoder:
    """Encodes texts as data preparation does, and knows where in the text each token ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: str, flag: str = "--models") -> None:
        from tokenizers import Tokenizer

        where = f"{flag} {model}: its tokenizer"
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"{where} is not a fast one; convert it with transformers first")
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise UserError(f"{where} has no BOS or no EOS token, which begin and end a document")
        self.bos_id, self.eos_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        serialized = tokenizer.backend_tokenizer.to_str()
        self.table = TokenBytes.of_json(serialized, tokenizer.all_special_ids)
        self.backend: Tokenizer = Tokenizer.from_str(serialized)
        self.backend.encode_special_tokens = True  # their strings in a text are text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None

    def encode(self, documents: Sequence[Document], name: str) -> list[EncodedDocument]:
        encoded = []
        bar = progress_bar(total=len(documents), desc=f"tokenize for {name}", unit=" documents", leave=False)
        with bar:
            for start in range(0, len(documents), BATCH_TEXTS):
                batch = documents[start : start + BATCH_TEXTS]
                texts = [document.text for document in batch]
                for document, encoding in zip(
                    batch, self.backend.encode_batch(texts, add_special_tokens=False), strict=True
                ):
                    encoded.append(self._place(document, encoding))
                bar.update(len(batch))
        return encoded

    def _place(self, document: Document, encoding: Encoding) -> EncodedDocument:
        ids = encoding.ids
        ends = None if self.table is None else self.table.ends_in(document.text, ids)
        if ends is None:  # the normalizer rewrote the text, for example; characters are as near as it gets
            ends = ends_by_offsets(document.text, [end for _, end in encoding.offsets])
        return EncodedDocument(np.array(ids, dtype=np.int32), ends, document.num_source_bytes)


def ends_by_offsets(text: str, character_ends: Sequence[int]) -> np.ndarray:
    """Where tokens end in bytes, from where they end in characters; the last ends with the text."""
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = np.maximum.accumulate(bytes_before[np.array(character_ends, dtype=np.int64)])
    if len(ends):
        ends[-1] = bytes_before[-1]
    return ends


def cut_windows(
    number: int, document: EncodedDocument, bos_id: int, eos_id: int, context_bytes: int, stride_bytes: int
) -> list[Window]:
    """The windows of a document; each token that ends beyond its source counts in exactly one."""
    ends = document.ends
    starts = np.concatenate([[0], ends[:-1]])
    size = int(ends[-1]) if len(ends) else 0
    # A dummy prefix that is a token of its own ends at byte 0; it counts where there is no source.
    has_source = document.num_source_bytes > 0
    scored = int(np.searchsorted(ends, document.num_source_bytes, side="right")) if has_source else 0
    windows = []
    border = context_bytes
    while True:
        border = min(border, size)
        is_last = border == size
        # Tokens without bytes at the end of the text belong to its last window.
        end = len(ends) if is_last else int(np.searchsorted(ends, border, side="right"))
        if end > scored or is_last:
            begin = min(int(np.searchsorted(starts, border - context_bytes)), scored)
            ids = [bos_id, *document.ids[begin:end], *([eos_id] if is_last else [])]
            windows.append(Window(number, np.array(ids, dtype=np.int32), end - scored + is_last))
            scored = end
        if is_last:
            return windows
        border += stride_bytes


def cut_documents(
    documents: Iterable[EncodedDocument], bos_id: int, eos_id: int, context_bytes: int, stride_bytes: int
) -> list[Window]:
    return [
        window
        for number, document in enumerate(documents)
        for window in cut_windows(number, document, bos_id, eos_id, context_bytes, stride_bytes)
    ]


def make_batches(windows: Sequence[Window], max_tokens: int) -> list[list[int]]:
    """Numbers of windows of about the same length, the longest first, up to `max_tokens` with padding."""
    order = sorted(range(len(windows)), key=lambda number: (-len(windows[number].ids), number))
    batches: list[list[int]] = []
    for number in order:
        if batches and len(windows[batches[-1][0]].ids) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
