"""What a conversation template can do, and the part that those share which write turn by turn.

`Template` is enough for inference. Data preparation also has to know which tokens have loss and where turns
end: a `TurnTemplate` says so in its segments, and each stretch of text between two special tokens is encoded
by itself. (The tokenizer's own Jinja template is a program that writes one text; see `jinja.py`.)
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from colossal_llama.conversation.binding import BoundForm, bind_form
from colossal_llama.conversation.form import CONTENT, Form, write_marker
from colossal_llama.conversation.jinja_text import write_jinja
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.stretches import EncodeTexts, EncodeWithBorders
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self


class Template(Protocol):
    """One way to write conversations for a tokenizer."""

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Self:
        """The template for this tokenizer; raises `UserError` when the tokenizer lacks what it needs."""

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """All messages so far, and what comes before the assistant's next answer: what a model completes."""

    def find_end_ids(self) -> set[int]:
        """The tokens that end an answer."""


class Segment(NamedTuple):
    """A stretch of text (`text` is set) or one special token (`token_id` is set), with or without loss.

    `loss_start`: of a text with loss, the character where that begins.
    """

    text: str | None = None
    token_id: int | None = None
    has_loss: bool = False
    loss_start: int = 0


@dataclass
class EncodedTurns:
    """A conversation in tokens.

    Attributes:
        ids: int32 [tokens].
        loss_spans: half-open spans of `ids` that have loss.
        turn_ends: number of tokens up to the end of each turn.
        answers: whether each turn has loss.
    """

    ids: np.ndarray
    loss_spans: list[tuple[int, int]]
    turn_ends: list[int]
    answers: list[bool]


@dataclass(frozen=True)
class _Turn:
    """What a template writes around what a message says, cut at special tokens.

        "Assistant: " <s> CONTENT </s>      "[INST] " CONTENT " [/INST]"  (and the answer goes on)
         ─ head ─     rest lead… after       ─ lead ─  … ─ trail ─

    Attributes:
        head: the text before the first of the special tokens that come before what is said.
        rest: those tokens and the texts between them; empty where there are none.
        before: `head` and `rest` behind an end of a turn.
        lead, trail: text around what is said, in one stretch with it.
        unlearned: the characters of `lead` that have no loss.
        after, learned: special tokens that follow, without and with loss; empty where the stretch goes on.
    """

    head: str
    rest: tuple[Segment, ...]
    before: tuple[Segment, ...]
    lead: str
    trail: str
    unlearned: int
    after: tuple[Segment, ...]
    learned: tuple[Segment, ...]


class TurnTemplate(ABC):
    """A template that writes each turn whatever the others are, as its `Form` says.

    Args:
        bound: the form, for a tokenizer.
        encode: encodes stretches of text between special tokens.
        encode_with_borders: the same ids, and the token where loss begins inside of a stretch.
    """

    def __init__(
        self, bound: BoundForm, encode: EncodeTexts, encode_with_borders: EncodeWithBorders | None = None
    ) -> None:
        self.bound = bound
        self.form = bound.form
        self._encode_texts, self._encode_with_borders = encode, encode_with_borders
        self._control_ids = dict(bound.control_ids)
        pattern = "|".join(map(re.escape, sorted(self._control_ids, key=len, reverse=True)))
        self._controls = re.compile(f"({pattern})")
        self._turns = {
            "system": self._cut_turn("", self.form.system),
            "human": self._cut_turn("", self.form.human),
            "assistant": self._cut_turn(self.form.header, self.form.answer),
        }
        opening = self._cut(self.form.opening)
        assert all(part.token_id is not None for part in opening), "an opening of special tokens alone"
        self._opening = tuple(opening)
        # Texts that come again and again: they are encoded once.
        heads = {self._turns[role].head for role in ("human", "assistant")}
        opening = ""
        if self.form.default_system and not self._turns["system"].after and not self.form.system_inside:
            opening = self.form.system.replace(CONTENT, self.form.default_system)
        texts = {bound.rule.write(text) for head in heads for text in (head, opening + head)} - {""}
        self._fixed = {
            text: np.array(ids, dtype=np.int32)
            for text, ids in zip(sorted(texts), encode(sorted(texts)), strict=True)
        }
        self._controls_as_ids = {i: np.array([i], dtype=np.int32) for i in self._control_ids.values()}

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Self:
        return cls(*bind_form(cls.describe(tokenizer, llama_version), tokenizer))

    @classmethod
    @abstractmethod
    def describe(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Form:
        """The form, in the tokenizer's special tokens; raises `UserError` when it lacks one."""

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self._control_ids[self.form.end]

    def chat_template(self) -> str | None:
        """The Jinja text from which `apply_chat_template` makes the same tokens; None if there is none."""
        if not self.bound.is_writable:
            return None
        return write_jinja(self.form, tuple(self._control_ids), self.bound.rule, write_marker(self.form))

    def render_turns(self, messages: Sequence[Message]) -> list[list[Segment]]:
        """Segments by turn (system messages are no turns); what comes before the first turn belongs to it.

        A turn ends with an answer's last token; a human's may go on in the answer's first stretch.
        """
        turns, _, pending = self._render(messages)
        if turns and pending:
            turns[-1].append(Segment(self.bound.rule.write(pending)))
        return turns

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """All turns so far, then what comes before the assistant's next one. Nothing has loss."""
        turns, opening, pending = self._render(messages)
        segments = [Segment(text, token_id) for turn in turns for text, token_id, _, _ in turn]
        head, *others = self._controls.split(self.form.header)
        header = self._cut(self.form.header[len(head) :]) if others else []
        text = self.bound.rule.write(pending + head)
        return [*segments, *opening, *([Segment(text)] if text else []), *header]

    def encode_conversations(self, conversations: Iterable[Sequence[Message]]) -> Iterator[EncodedTurns]:
        """The tokens of each conversation, in order; the texts of all are encoded in one batch."""
        return self._encode([self.render_turns(messages) for messages in conversations])

    def encode_messages(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, as in a row."""
        turns = self.render_turns(messages)
        segments = [Segment(text, token_id) for turn in turns for text, token_id, _, _ in turn]
        (encoded,) = self._encode([[segments]])
        return encoded.ids.tolist()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        if refusal := self.form.find_refusal(messages):
            raise UserError(f"the template refuses the conversation: {refusal}")
        (encoded,) = self._encode([[self.render_prompt(messages)]])
        return encoded.ids.tolist()

    def find_end_ids(self) -> set[int]:
        return {self.end_id}

    def _cut(self, text: str, has_loss: bool = False) -> list[Segment]:
        """A text without `CONTENT` in segments, as it is behind a special token."""
        return [
            Segment(None, self._control_ids[part], has_loss)
            if part in self._control_ids
            else Segment(self.bound.rule.write(part), None, has_loss)
            for part in self._controls.split(text)
            if part
        ]

    def _cut_turn(self, header: str, body: str) -> _Turn:
        """Cuts what is written for a message; `header` is what of it has no loss where the rest has."""
        before, after = (header + (body or CONTENT)).split(CONTENT)
        *heads, lead = self._controls.split(before)
        trail, *tails = self._controls.split(after)
        assert not tails or not tails[-1], "a message ends with what it says, or with a special token"
        rest = before[len(heads[0]) : len(before) - len(lead)] if heads else ""
        return _Turn(
            head=heads[0] if heads else "",
            rest=tuple(self._cut(rest)),
            before=tuple(self._cut(before[: len(before) - len(lead)])),
            lead=lead,
            trail=trail,
            unlearned=max(0, len(header) - (len(before) - len(lead))),
            after=tuple(self._cut(after[len(trail) :])),
            learned=tuple(self._cut(after[len(trail) :], has_loss=True)),
        )

    def _render(self, messages: Sequence[Message]) -> tuple[list[list[Segment]], list[Segment], str]:
        """Segments by turn, those that no turn has followed, and the text that goes on behind the last."""
        form, write, patterns = self.form, self.bound.rule.write, self._turns
        written, inside = form.add_system(messages)
        segments = list(self._opening)
        rendered = []
        pending = ""
        for message in written:
            role, content = message.role, message.content
            turn = patterns[role]
            if inside:
                content, inside = inside + content, ""
            if form.trims:
                content = content.strip()
            if turn.rest:
                if pending:
                    segments.append(Segment(write(pending + turn.head)))
                    segments += turn.rest
                    pending = ""
                else:
                    segments += turn.before
            stretch = pending + turn.lead + content + turn.trail
            if not turn.after:
                pending = stretch
            else:
                has_loss = role == "assistant" and bool(content)
                text = write(stretch)
                loss_start = 0
                if has_loss and (pending or turn.unlearned):
                    loss_start = len(text) - len(stretch) + len(pending) + turn.unlearned
                segments.append(Segment(text, None, has_loss, loss_start))
                segments += turn.learned if has_loss else turn.after
                pending = ""
            if role != "system":
                rendered.append(segments)
                segments = []
        return rendered, segments, pending

    def _encode(self, conversations: Sequence[Sequence[Sequence[Segment]]]) -> Iterator[EncodedTurns]:
        fixed_texts = self._fixed
        texts, split_texts, positions = [], [], []
        for turns in conversations:
            for segments in turns:
                for text, _, _, loss_start in segments:
                    if loss_start:
                        split_texts.append(text)
                        positions.append(loss_start)
                    elif text and text not in fixed_texts:
                        texts.append(text)
        encoded = iter(self._encode_texts(texts))
        split = iter(self._encode_with_borders(split_texts, positions) if split_texts else ())
        of_control = self._controls_as_ids
        for turns in conversations:
            parts: list[Sequence[int]] = []
            loss_spans, turn_ends, answers = [], [], []
            end = 0
            for segments in turns:
                num_spans = len(loss_spans)
                for text, token_id, has_loss, loss_start in segments:
                    start = end
                    if token_id is not None:
                        part = of_control[token_id]
                    elif loss_start:
                        part, border = next(split)
                        start += border
                    elif text:
                        part = fixed_texts.get(text)
                        if part is None:
                            part = next(encoded)
                    else:
                        part = ()
                    parts.append(part)
                    end += len(part)
                    if has_loss:
                        loss_spans.append((start, end))
                turn_ends.append(end)
                answers.append(len(loss_spans) > num_spans)
            ids = np.concatenate(parts, dtype=np.int32, casting="unsafe") if parts else np.zeros(0, np.int32)
            yield EncodedTurns(ids, loss_spans, turn_ends, answers)
