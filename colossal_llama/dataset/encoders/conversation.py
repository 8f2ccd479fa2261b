"""Conversations in a template that writes turn by turn: whole turns up to `max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama.conversation import find_template
from colossal_llama.conversation.template import EncodedTurns, SpecialTokens
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.encoders.conversation_records import (
    ConversationRecord,
    describe_conversation,
    parse_conversation,
)
from colossal_llama.dataset.engines import load_engine
from colossal_llama.dataset.settings import SftSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ConversationEncoder:
    """Conversations in the template that the spec names."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.max_length = spec.max_length
        engine = load_engine(spec.engine, spec.tokenizer_json)
        template = find_template(spec.conversation_template)
        self.template = template(SpecialTokens(spec.bos_id, spec.end_id), engine.encode)

    @classmethod
    def make_spec(
        cls, tokenizer: PreTrainedTokenizerFast, settings: SftSettings, max_length: int
    ) -> EncoderSpec:
        """The template's special tokens are looked up in the tokenizer."""
        template = find_template(settings.template)
        special = template.of_tokenizer(tokenizer, settings.llama_version).special
        return EncoderSpec(
            "sft",
            special.bos_id,
            special.end_of_turn_id,
            max_length,
            conversation_template=settings.template,
        )

    def parse(self, value: dict[str, Any]) -> ConversationRecord:
        return parse_conversation(value)

    def encode(self, records: Sequence[ConversationRecord]) -> list[Outcome]:
        encoded = self.template.encode_conversations([record.messages for record in records])
        return [
            keep_whole_turns(record, turns, self.max_length)
            for record, turns in zip(records, encoded, strict=True)
        ]


def keep_whole_turns(record: ConversationRecord, turns: EncodedTurns, max_length: int) -> Outcome:
    """The longest run of whole turns from the start that fits `max_length` and ends with an answer."""
    plain = np.array(turns.ids, dtype=np.int32)
    stored = ~plain
    for start, end in turns.loss_spans:
        stored[start:end] = plain[start:end]
    outcome = Outcome(len(stored), notes=describe_conversation(record.messages))
    ends = [end for end, has_loss in zip(turns.turn_ends, turns.answers, strict=True) if has_loss]
    fitting = [end for end in ends if end <= max_length]
    if not fitting:
        outcome.reason = "first answer beyond max_length" if ends else "no answer"
        outcome.dropped_tokens = {outcome.reason: len(stored)} if len(stored) else {}
        return outcome
    outcome.pieces = [stored[: fitting[-1]]]
    if len(stored) > ends[-1]:
        outcome.dropped_tokens["after the last answer"] = len(stored) - ends[-1]
    if ends[-1] > fitting[-1]:
        outcome.dropped_tokens["turns beyond max_length"] = ends[-1] - fitting[-1]
        outcome.notes.append("cut to whole turns")
    return outcome
