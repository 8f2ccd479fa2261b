"""The encoders, one kind of data set in one file each, and what can become of long documents.

A new encoder is a class with the methods of `RecordEncoder` (`base.py`) in a file of its own, and a line
here. A new policy for long documents is a function like those of `long_documents.py`, and a line here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from colossal_llama.utils.registry import look_up

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome, RecordEncoder

# Kind -> module and class; names alone, since a worker needs one of them.
ENCODERS = {
    "pretrain": "colossal_llama.dataset.encoders.pretraining:PretrainEncoder",
    "sft": "colossal_llama.dataset.encoders.conversation:ConversationEncoder",
    "chat_template": "colossal_llama.dataset.encoders.own_template:ChatTemplateEncoder",
}
# The choices of `--long_documents` -> module and function.
LONG_DOCUMENTS = {
    "chunk": "colossal_llama.dataset.encoders.long_documents:chunk",
    "truncate": "colossal_llama.dataset.encoders.long_documents:truncate",
}


def find_encoder(kind: str) -> type[RecordEncoder]:
    """The class of an encoder."""
    return look_up(ENCODERS, kind)


def find_policy(name: str) -> Callable[[np.ndarray, int], Outcome]:
    """What becomes of the stored tokens of a document that is longer than a row."""
    return look_up(LONG_DOCUMENTS, name)


@lru_cache(maxsize=1)
def load_encoder(spec: EncoderSpec) -> RecordEncoder:
    """The encoder of a spec, loaded once a process."""
    return find_encoder(spec.kind)(spec)
