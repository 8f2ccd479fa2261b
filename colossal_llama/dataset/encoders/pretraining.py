"""Pre-training records: BOS, the text, EOS, and the loss mask of a `source`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from colossal_llama.corpus.records import BadRecord, take_category, take_string
from colossal_llama.dataset.encoders import find_policy
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.engines import load_engine
from colossal_llama.dataset.settings import PretrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class PretrainRecord:
    source: str
    target: str
    category: str
    format: ClassVar[str] = "pretrain"

    @property
    def num_characters(self) -> int:
        return len(self.source) + len(self.target)

    @property
    def text(self) -> str:
        return self.source + self.target

    def as_json(self) -> dict[str, Any]:
        return {"source": self.source, "target": self.target, "category": self.category}


class PretrainEncoder:
    """`{"source", "target", "category"}`: BOS + source + target + EOS, loss on what ends beyond `source`."""

    uses_engine = True

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self.engine = load_engine(spec.engine, spec.tokenizer_json, spec.engine_json)
        self.fit = find_policy(spec.long_documents)
        text_field = spec.text_field
        self.fields = (text_field, "category") if text_field else ("source", "target", "category")

    @classmethod
    def make_spec(
        cls, tokenizer: PreTrainedTokenizerFast, settings: PretrainSettings, max_length: int
    ) -> EncoderSpec:
        """BOS and EOS are the tokenizer's."""
        return EncoderSpec(
            "pretrain",
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            max_length,
            long_documents=settings.long_documents,
            text_field=settings.text_field,
        )

    @classmethod
    def report(cls, spec: EncoderSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        """Nothing."""

    def parse(self, value: dict[str, Any]) -> PretrainRecord:
        if self.spec.text_field:
            return PretrainRecord("", take_string(value, self.spec.text_field), take_category(value))
        if "source" not in value and "target" not in value:
            _name_other_kinds(value)
        return PretrainRecord(
            take_string(value, "source"), take_string(value, "target"), take_string(value, "category")
        )

    def encode(self, records: Sequence[PretrainRecord]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(records)
        without_source = [i for i, record in enumerate(records) if not record.source]
        with_source = [i for i, record in enumerate(records) if record.source]
        texts = [records[i].target for i in without_source]
        for i, ids in zip(without_source, self.engine.encode(texts), strict=True):
            outcomes[i] = self._finish(records[i], self._add_ends(ids))
        # Only these need a border, which costs a part of the tokenizer's speed.
        texts = [records[i].source + records[i].target for i in with_source]
        positions = [len(records[i].source) for i in with_source]
        encoded = self.engine.encode_with_borders(texts, positions)
        for i, (ids, border) in zip(with_source, encoded, strict=True):
            stored = self._add_ends(ids)
            num_without_loss = 1 + border
            stored[:num_without_loss] = ~stored[:num_without_loss]
            outcomes[i] = self._finish(records[i], stored)
        return outcomes  # type: ignore[return-value]

    def _add_ends(self, ids: Sequence[int]) -> np.ndarray:
        stored = np.empty(len(ids) + 2, dtype=np.int32)
        stored[0] = self.spec.bos_id
        stored[1:-1] = ids
        stored[-1] = self.spec.end_id
        return stored

    def _finish(self, record: PretrainRecord, stored: np.ndarray) -> Outcome:
        num_tokens = len(stored)
        if not record.target:
            reason = "empty target" if record.source else "empty record"
            return Outcome(num_tokens, dropped_tokens={reason: num_tokens}, reason=reason)
        max_length = self.spec.max_length
        if num_tokens <= max_length:
            return Outcome(num_tokens, [stored])
        return self.fit(stored, max_length)


def _name_other_kinds(record: dict[str, Any]) -> None:
    """Raises `BadRecord` for what another script or flag is for."""
    for field in ("messages", "conversations", "instruction"):
        if field in record:
            raise BadRecord(
                "conversations", f"is a conversation (found '{field}'); use prepare_sft_dataset.py for these"
            )
    if isinstance(record.get("text"), str):
        raise BadRecord("'source' missing", "'source' is missing (found 'text'); give --text_field text")
