"""Conversations in the tokenizer's own Jinja template, whole turns up to `max_length`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colossal_llama.conversation.carried import CarriedTemplate
from colossal_llama.conversation.jinja import REFUSED, JinjaTemplate, Refused, Rendered
from colossal_llama.conversation.special_strings import NOTE
from colossal_llama.corpus.records import BadRecord
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.encoders.conversation_records import (
    CONVERSATION_FIELDS,
    ConversationRecord,
    describe_conversation,
    parse_conversation,
)
from colossal_llama.dataset.labels import has_loss
from colossal_llama.dataset.settings import SftSettings

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class TemplatedRecord(ConversationRecord):
    """A conversation and how it is rendered.

    Args:
        ends: numbers of messages up to each answer, the last first.
        full: all of it; None if the template refuses it.
        up_to_answer: up to the last answer; None if there is none.
    """

    ends: list[int]
    full: Rendered | None
    up_to_answer: Rendered | None


class ChatTemplateEncoder:
    """Conversations in the tokenizer's template; whole turns up to `max_length`."""

    fields = CONVERSATION_FIELDS
    uses_engine = False

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import PreTrainedTokenizerFast

        variables = dict(spec.template_tokens)
        special = {name: value for name, value in variables.items() if isinstance(value, str)}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec.tokenizer_json, **special)
        self.max_length = spec.max_length
        self.template = JinjaTemplate(tokenizer, spec.template, variables)

    @classmethod
    def make_spec(
        cls, tokenizer: PreTrainedTokenizerFast, settings: SftSettings, max_length: int
    ) -> EncoderSpec:
        """The template and the special tokens that it may name; `UserError` when it can't be used."""
        template = JinjaTemplate.of_tokenizer(tokenizer)
        template.check()
        return EncoderSpec(
            "chat_template",
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            max_length,
            template=template.template,
            template_tokens=template.tokens(),
            carried=CarriedTemplate("tokenizer"),
        )

    @classmethod
    def report(cls, spec: EncoderSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        """Nothing."""

    def parse(self, value: dict[str, Any]) -> TemplatedRecord:
        record = parse_conversation(value)
        messages = record.messages
        self.template.check_characters(messages)
        ends = [i + 1 for i, m in enumerate(messages) if m.role == "assistant" and m.content]
        ends.reverse()
        full = up_to_answer = None
        try:
            if ends:
                full = up_to_answer = self.template.render(messages[: ends[0]])
            if not ends or ends[0] < len(messages):
                full = self.template.render(messages, with_spans=False)
        except Refused:
            full = None
        return TemplatedRecord(messages, record.category, ends, full, up_to_answer, format=record.format)

    def encode(self, records: Sequence[TemplatedRecord]) -> list[Outcome]:
        encoded = iter(
            self._encode_rendered([r.up_to_answer or r.full for r in records if r.full is not None])
        )
        return [
            self._refuse(record) if record.full is None else self._finish(record, next(encoded))
            for record in records
        ]

    def _refuse(self, record: TemplatedRecord) -> Outcome:
        return Outcome(0, reason=REFUSED, notes=describe_conversation(record.messages))

    def _finish(self, record: TemplatedRecord, stored: np.ndarray) -> Outcome:
        """`stored`: the conversation up to its last answer, or all of it when there is none."""
        notes = describe_conversation(record.messages)
        if record.full.is_renamed:
            notes.append(NOTE)
        if record.up_to_answer is None:
            return Outcome(len(stored), [], {"no answer": len(stored)}, "no answer", notes)
        num_tokens = num_up_to_answer = len(stored)
        if record.full.text != record.up_to_answer.text:
            # A template may write less for a longer conversation: then nothing is counted as dropped.
            num_tokens = max(num_tokens, len(self._encode_rendered([record.full])[0]))
        if len(stored) > self.max_length:
            stored = self._find_fitting(record)
        reason = None
        if stored is None:
            reason = "first answer beyond max_length"
        elif not has_loss(stored):  # a template may write nothing of what is said
            reason = "no answer"
        if reason is not None:
            return Outcome(num_tokens, [], {reason: num_tokens}, reason, notes)
        outcome = Outcome(num_tokens, [stored], notes=notes)
        if num_tokens > num_up_to_answer:
            outcome.dropped_tokens["after the last answer"] = num_tokens - num_up_to_answer
        if len(stored) < num_up_to_answer:
            outcome.dropped_tokens["turns beyond max_length"] = num_up_to_answer - len(stored)
            outcome.notes.append("cut to whole turns")
        return outcome

    def _find_fitting(self, record: TemplatedRecord) -> np.ndarray | None:
        """The stored tokens of the longest beginning that ends with an answer and fits; None if none does.

        Each beginning is rendered as a conversation of its own: the template may write it in another way.
        """
        for end in record.ends[1:]:
            messages = record.messages[:end]
            with contextlib.suppress(BadRecord):
                (stored,) = self._encode_rendered([self.template.render(messages, with_spans=False)])
                if len(stored) <= self.max_length:  # only now are the answers looked for, which takes longer
                    return self._encode_rendered([self.template.render(messages)])[0]
        return None

    def _encode_rendered(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """Stored tokens of each text: a token that holds a character of a span has loss."""
        documents = []
        for one, encoding in zip(rendered, self.template.encode_rendered(rendered), strict=True):
            plain = np.array(encoding.ids, dtype=np.int32)
            stored = ~plain
            for start, end in one.spans:
                inside = find_tokens(encoding, start, end)
                stored[inside] = plain[inside]
            documents.append(stored)
        return documents


def find_tokens(encoding: Encoding, start: int, end: int) -> slice | np.ndarray:
    """Which tokens hold a character of the text from `start` to `end`, the last excluded."""
    first = last = None
    if start < end:
        first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1)
    if first is not None and last is not None:
        # Several tokens may hold one character, and the last of them what follows it too.
        while (place := encoding.token_to_chars(last + 1)) is not None and place[0] < end:
            last += 1
        return slice(first, last + 1)
    # The normaliser left out a character there. All offsets of a long text are slow to fetch.
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    return (offsets[:, 1] > start) & (offsets[:, 0] < end)
