"""tuetoken, a BPE of its own in Rust: several times as fast on one core. `pip install tuetoken==0.1.3`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np


class TuetokenEngine:
    """One thread; parallelism is by process."""

    def __init__(self, tokenizer_json: str) -> None:
        from tuetoken import Tokenizer

        self.backend = Tokenizer(tokenizer_json)

    def encode(self, texts: Sequence[str]) -> Iterator[np.ndarray]:
        encoded = self.backend.encode_ordinary_to_buffer(list(texts), num_threads=1)
        ids, bounds = encoded["data"].astype(np.int32), encoded["offsets"].tolist()
        return (ids[start:end] for start, end in pairwise(bounds))
