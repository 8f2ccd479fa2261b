"""How often a corpus has each new piece, and a sample of its text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from colossal_llama.evaluation.held_out_text import Document
from colossal_llama.evaluation.hidden_states import TextSample
from colossal_llama.evaluation.windows import TextEncoder, Window, cut_documents
from colossal_llama.model.output_calibration import smooth_frequencies
from colossal_llama.tokenizer.corpus_texts import read_samples
from colossal_llama.utils.console import progress_bar
from colossal_llama.utils.errors import UserError

BATCH_TEXTS = 1000
TEXTS_AT_ONCE = 64
# Of a longer text a stretch of this many characters is taken into the sample.
SAMPLE_CHARACTERS = 4096


@dataclass(frozen=True)
class Corpus:
    """What the calibration needs of a corpus.

    Attributes:
        counts: occurrences of each new piece, int64 [new rows].
        total: tokens, an EOS for each record among them.
        texts: a random sample, in random order.
    """

    counts: np.ndarray
    total: int
    texts: list[str]

    def frequencies(self) -> torch.Tensor:
        """The smoothed share of each new piece, fp64 [new rows]."""
        return smooth_frequencies(torch.from_numpy(self.counts), self.total)


def read_corpus(
    directories: list[Path], encoder: TextEncoder, new_rows: range, num_texts: int, seed: int
) -> Corpus:
    """Encodes the whole corpus once.

    Raises:
        UserError: there is no text in it, or no new piece in the text.
    """
    sample = TextSample(num_texts, SAMPLE_CHARACTERS, seed)
    counts = np.zeros(len(new_rows), dtype=np.int64)
    total = 0
    batch: list[str] = []

    def count() -> None:
        nonlocal total
        for encoding in encoder.backend.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.int64)
            total += len(ids) + 1
            new = ids[(ids >= new_rows.start) & (ids < new_rows.stop)] - new_rows.start
            np.add.at(counts, new, 1)
        batch.clear()

    texts = progress_bar(read_samples(directories), desc="new pieces in the corpus", unit=" texts")
    for text in sample.pass_on(texts):
        batch.append(text)
        if len(batch) == BATCH_TEXTS:
            count()
    count()
    if not sample.texts:
        raise UserError("--data_input_dirs: no text in any record")
    if not counts.any():
        raise UserError(
            f"--data_input_dirs: none of the {len(new_rows):,} new pieces occurs in the {total:,} tokens of "
            "this corpus, so it can't say how often to expect them; give text that the vocabulary was "
            "extended for"
        )
    return Corpus(counts, total, sample.shuffled())


def take_windows(
    texts: list[str], encoder: TextEncoder, num_positions: int, context_bytes: int
) -> list[Window]:
    """Windows of texts, one after the other, until about `num_positions` tokens count."""
    windows: list[Window] = []
    num_found = 0
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = [Document("", "", "", text) for text in texts[start : start + TEXTS_AT_ONCE]]
        for document in encoder.encode(part, "the sample"):
            windows += cut_documents([document], encoder.bos_id, encoder.eos_id, context_bytes, context_bytes)
            num_found += len(document.ids) + 1
            if num_found >= num_positions:
                return windows
    return windows
