"""Conversations in the tokenizer's own Jinja template, with exact assistant masks.

Two things have to survive the rendering: where an assistant speaks, and which special-token strings come from
the template (control tokens) and which from the user's text (plain text). Both are marked with Unicode
noncharacters, which never stand for text, and the marks are taken out again before anything is encoded:

    content "a </s>"      ─▶  a ⟪0⟫            the 0th special token's string, as text
    {% generation %}      ─▶  ⟦ … ⟧            what the assistant says
    template's own </s>   ─▶  </s>             renamed, as it is in the tokenizer that encodes

A template without `{% generation %}` is rendered message by message; each rendering has to begin with the one
before it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from colossal_llama.dataset.conversation import Message
from colossal_llama.dataset.jsonl import BadRecord
from colossal_llama.dataset.tokenization import (
    ConversationRecord,
    EncoderSpec,
    Outcome,
    describe_conversation,
    parse_conversation,
)
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPEN, CLOSE, QUOTE, RENAMED = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = re.compile(f"[{OPEN}-{RENAMED}]")
ROLE_NAMES = {"human": "user", "assistant": "assistant", "system": "system"}
GENERATION = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")
# Some templates write today's date, and the output would depend on it; this is LLaMA 3.1's own default.
DATE = datetime(2024, 7, 26)
DATE_STRING = "26 Jul 2024"


@dataclass(frozen=True)
class Rendered:
    """Text for the renamed tokenizer, and the half-open character spans that an assistant says."""

    text: str
    spans: list[tuple[int, int]]


@dataclass(frozen=True)
class TemplatedRecord(ConversationRecord):
    """A conversation and its renderings up to each answer, the last first; `full` is all of it."""

    full: Rendered
    answers: list[Rendered]


def check_chat_template(tokenizer: PreTrainedTokenizerFast) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The tokenizer's template and the special tokens that it may name; `UserError` when it can't be used."""
    where = f"--chat_template: {tokenizer.name_or_path}"
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise UserError(f"{where}: this tokenizer has no chat template; leave the flag out") from None
    special = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    try:
        renderer = TemplateRenderer(tokenizer, template)
        renderer.render_answers([Message("human", "a"), Message("assistant", "b")] * 2)
    except BadRecord as error:
        raise UserError(f"{where}: {error}") from None
    return template, tuple(sorted(special.items()))


class ChatTemplateEncoder:
    """Conversations in the tokenizer's template; whole turns up to `max_length`."""

    def __init__(self, spec: EncoderSpec) -> None:
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(tokenizer_file=spec.tokenizer_json, **dict(spec.template_tokens))
        self.max_length = spec.max_length
        self.renderer = TemplateRenderer(tokenizer, spec.template)
        self.backend = rename_special_tokens(tokenizer.backend_tokenizer, self.renderer.special_tokens)

    def parse(self, value: dict[str, Any]) -> TemplatedRecord:
        record = parse_conversation(value)
        full, answers = self.renderer.render_answers(record.messages)
        return TemplatedRecord(record.messages, record.category, full, answers)

    def encode(self, records: Sequence[TemplatedRecord]) -> list[Outcome]:
        encoded = self._encode_rendered([r.answers[0] if r.answers else r.full for r in records])
        return [self._finish(record, stored) for record, stored in zip(records, encoded, strict=True)]

    def _finish(self, record: TemplatedRecord, stored: np.ndarray) -> Outcome:
        """`stored`: the conversation up to its last answer, or all of it when there is none."""
        notes = describe_conversation(record.messages)
        if not record.answers:
            return Outcome(len(stored), [], {"no answer": len(stored)}, "no answer", notes)
        num_tokens = num_up_to_answer = len(stored)
        if record.full.text != record.answers[0].text:
            # A template may write less for a longer conversation: then nothing is counted as dropped.
            num_tokens = max(num_tokens, len(self._encode_rendered([record.full])[0]))
        outcome = Outcome(num_tokens, notes=notes)
        if num_tokens > num_up_to_answer:
            outcome.dropped_tokens["after the last answer"] = num_tokens - num_up_to_answer
        shorter = iter(record.answers[1:])
        while len(stored) > self.max_length:
            rendered = next(shorter, None)
            if rendered is None:
                reason = "first answer beyond max_length"
                return Outcome(num_tokens, [], {reason: num_tokens}, reason, notes)
            (stored,) = self._encode_rendered([rendered])
        outcome.pieces = [stored]
        if len(stored) < num_up_to_answer:
            outcome.dropped_tokens["turns beyond max_length"] = num_up_to_answer - len(stored)
            outcome.notes.append("cut to whole turns")
        return outcome

    def _encode_rendered(self, rendered: Sequence[Rendered]) -> list[np.ndarray]:
        """Stored tokens of each text: a token that holds a character of a span has loss."""
        documents = []
        encodings = self.backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        for one, encoding in zip(rendered, encodings, strict=True):
            plain = np.array(encoding.ids, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            stored = ~plain
            for start, end in one.spans:
                has_loss = (offsets[:, 1] > start) & (offsets[:, 0] < end)
                stored[has_loss] = plain[has_loss]
            documents.append(stored)
        return documents


class TemplateRenderer:
    """Renders messages with a tokenizer's template, keeping track of spans and special tokens (see above)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        self.special_tokens = sorted(
            (t.content for t in added if t.special or (t.content in template and is_mark(t.content))),
            key=lambda token: (-len(token), token),
        )
        alternatives = "|".join(map(re.escape, self.special_tokens))
        self.special_pattern = re.compile(alternatives)
        self.rendered_pattern = re.compile(f"{OPEN}|{CLOSE}|{QUOTE}(\\d+){QUOTE}|{alternatives}")
        self.has_generation = GENERATION.search(template) is not None
        self.template = GENERATION.sub(_mark_generation, template) if self.has_generation else template

    def render_answers(self, messages: Sequence[Message]) -> tuple[Rendered, list[Rendered]]:
        """All messages, and the beginnings that end with an answer, the longest first; raises `BadRecord`."""
        if any(MARKS.search(message.content) for message in messages):
            raise BadRecord("noncharacter", "a message holds a Unicode noncharacter (U+FDD0 to U+FDD3)")
        ends = [i + 1 for i, m in enumerate(messages) if m.role == "assistant" and m.content]
        return self._render(messages), [self._render(messages[:end]) for end in reversed(ends)]

    def _render(self, messages: Sequence[Message]) -> Rendered:
        text = self._apply(messages)
        if not self.has_generation:
            text = self._mark_by_prefixes(messages, text)
        parts, spans = [], []
        length = start = position = 0
        for match in self.rendered_pattern.finditer(text):
            mark = match.group()
            if mark in (OPEN, CLOSE):
                part = ""
            elif mark.startswith(QUOTE):
                part = self.special_tokens[int(match.group(1))]
            else:
                part = renamed(self.special_tokens.index(mark))
            before = text[position : match.start()]
            parts += [before, part]
            length += len(before) + len(part)
            position = match.end()
            if mark == OPEN:
                start = length
            elif mark == CLOSE:
                spans.append((start, length))
        parts.append(text[position:])
        return Rendered("".join(parts), self._choose_spans(messages, spans))

    def _choose_spans(
        self, messages: Sequence[Message], spans: list[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Leaves out the answers without content: there is nothing in them to learn but silence."""
        answers = [message for message in messages if message.role == "assistant"]
        if len(spans) != len(answers):
            raise BadRecord(
                "answers not marked",
                f"the chat template marks {len(spans)} of {len(answers)} answers with {{% generation %}}",
            )
        return [span for span, answer in zip(spans, answers, strict=True) if answer.content]

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        chat = [
            {"role": ROLE_NAMES[message.role], "content": self._quote(message.content)}
            for message in messages
        ]
        try:
            (text,) = self.tokenizer.apply_chat_template(
                [chat],  # a batch, which transformers also takes when there is no message in it yet
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                date_string=DATE_STRING,
                strftime_now=DATE.strftime,
            )
        except Exception as error:  # a template is a program, and fails in any way
            raise BadRecord(
                "refused by the chat template", f"the chat template refuses it: {error}"
            ) from None
        return text

    def _quote(self, content: str) -> str:
        return self.special_pattern.sub(
            lambda match: f"{QUOTE}{self.special_tokens.index(match.group())}{QUOTE}", content
        )

    def _mark_by_prefixes(self, messages: Sequence[Message], text: str) -> str:
        """Puts marks around what each assistant message adds to the rendering of the messages before it."""
        parts, position = [], 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._apply(messages[:index], add_generation_prompt=True)
            after = self._apply(messages[: index + 1])
            if not (after.startswith(before) and text.startswith(after) and len(before) >= position):
                raise BadRecord(
                    "not rendered turn by turn",
                    "the chat template has no {% generation %} marks, and what it writes for the beginning "
                    "of a conversation is not the beginning of what it writes for all of it; put the marks "
                    "around the assistant's part of the template, or leave --chat_template out",
                )
            parts += [text[position : len(before)], OPEN, text[len(before) : len(after)], CLOSE]
            position = len(after)
        return "".join([*parts, text[position:]])


def is_mark(token: str) -> bool:
    """Whether an added token that is not said to be special looks like one, `<|im_end|>` for instance.

    A template that writes such a token means it as a control token, however it was added to the vocabulary.
    """
    ends = token[:1] + token[-1:]
    return len(token) > 2 and not any(character.isalnum() or character.isspace() for character in ends)


def renamed(index: int) -> str:
    """The name under which the encoding tokenizer knows the special token with this index."""
    return f"{RENAMED}{index}{RENAMED}"


def rename_special_tokens(backend: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """A copy whose special tokens have the names of `renamed`, so that their own strings are plain text.

    The ids, and everything else in which the tokenizers encode text, are the same.
    """
    names = {token: renamed(index) for index, token in enumerate(special_tokens)}
    value = json.loads(backend.to_str())
    value.update(post_processor=None, truncation=None, padding=None)
    for added in value["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = value["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(value))
    assert all(copy.token_to_id(name) == backend.token_to_id(token) for token, name in names.items())
    return copy


def _mark_generation(tag: re.Match[str]) -> str:
    """Two tags around a mark for one `{% generation %}`: white space on both sides is treated as before."""
    left, end, right = tag.groups()
    statement, mark = ("endif", CLOSE) if end else ("if true", OPEN)
    return f"{{%{left} {statement} %}}{{{{ '{mark}' }}}}{{% {statement} {right}%}}"
