"""Conversations in a template that writes turn by turn: whole turns up to `max_length`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from colossal_llama.conversation import find_template
from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.conversation.special_strings import NOTE, SpecialStrings
from colossal_llama.conversation.stretches import encode_plain_texts
from colossal_llama.conversation.template import EncodedTurns
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.encoders.conversation_records import (
    CONVERSATION_FIELDS,
    ConversationRecord,
    describe_conversation,
    parse_conversation,
)
from colossal_llama.dataset.engines import load_engine
from colossal_llama.dataset.settings import SftSettings
from colossal_llama.dataset.template_report import report_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ConversationEncoder:
    """Conversations in the template that the spec names."""

    fields = CONVERSATION_FIELDS
    uses_engine = True

    def __init__(self, spec: EncoderSpec) -> None:
        assert spec.bound_form is not None
        self.max_length = spec.max_length
        engine = load_engine(spec.engine, spec.tokenizer_json, spec.engine_json)
        template = find_template(spec.conversation_template)
        self.template = template(spec.bound_form, engine.encode, engine.encode_with_borders)
        self.special_strings = SpecialStrings(spec.bound_form.special_tokens)

    @classmethod
    def make_spec(
        cls, tokenizer: PreTrainedTokenizerFast, settings: SftSettings, max_length: int
    ) -> EncoderSpec:
        """The template's special tokens are looked up in the tokenizer, which is tried out."""
        template = find_template(settings.template).of_tokenizer(tokenizer, settings.llama_version)
        return EncoderSpec(
            "sft",
            tokenizer.bos_token_id,
            template.end_id,
            max_length,
            conversation_template=settings.template,
            bound_form=template.bound,
            carried=CarriedTemplate.of_template(template),
        )

    @classmethod
    def report(cls, spec: EncoderSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        """Says where no chat template makes the rows, or transformers' slow tokenizer other ones."""
        assert spec.bound_form is not None
        template = find_template(spec.conversation_template)
        report_template(template(spec.bound_form, partial(encode_plain_texts, tokenizer)), tokenizer)

    def parse(self, value: dict[str, Any]) -> ConversationRecord:
        return parse_conversation(value)

    def encode(self, records: Sequence[ConversationRecord]) -> list[Outcome]:
        outcomes: list[Outcome | None] = [self._refuse(record) for record in records]
        places = [place for place, outcome in enumerate(outcomes) if outcome is None]
        encoded = self.template.encode_conversations([records[place].messages for place in places])
        for place, turns in zip(places, encoded, strict=True):
            outcomes[place] = outcome = keep_whole_turns(records[place], turns, self.max_length)
            if self.special_strings.are_in(records[place].messages):
                outcome.notes.append(NOTE)
        return outcomes  # type: ignore[return-value]

    def _refuse(self, record: ConversationRecord) -> Outcome | None:
        """The outcome for a conversation that the template has no place for."""
        reason = self.template.form.find_refusal(record.messages)
        if reason is None:
            return None
        return Outcome(0, reason=reason, notes=describe_conversation(record.messages))


def keep_whole_turns(record: ConversationRecord, turns: EncodedTurns, max_length: int) -> Outcome:
    """The longest run of whole turns from the start that fits `max_length` and ends with an answer."""
    stored = ~turns.ids
    for start, end in turns.loss_spans:
        stored[start:end] = turns.ids[start:end]
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
