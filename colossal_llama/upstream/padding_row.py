"""The row of the padding token does not train.

Broken in: transformers 4.51.3, which makes `pad_token_id` of a configuration the `padding_idx` of the
embedding, and colossalai 0.5.0, whose split embeddings keep it. Padding needs no such row: it has no loss.
Shows as: a row whose gradient is always zero; 2 freezes `</s>`, -1 the last piece.
Cure: build the model while the configuration has no padding token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig


@contextlib.contextmanager
def without_padding_row(config: LlamaConfig) -> Iterator[int | None]:
    """The context in which a model of this configuration is built; gives the id that it hides."""
    pad_token_id = config.pad_token_id
    config.pad_token_id = None
    try:
        yield pad_token_id
    finally:
        config.pad_token_id = pad_token_id
