"""What a conversation template can do, and the part that those share which write turn by turn.

`Template` is enough for inference. Data preparation also has to know which tokens have loss and where turns
end: a `TurnTemplate` says so in its segments, and each stretch of text between two special tokens is encoded
by itself. (The tokenizer's own Jinja template is a program that writes one text; see `jinja.py`.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from colossal_llama.conversation.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

# Token ids of each text by itself: nothing added, and the strings of special tokens taken as plain text.
EncodeTexts = Callable[[Sequence[str]], Iterable[list[int]]]


class Template(Protocol):
    """One way to write conversations for a tokenizer."""

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Self:
        """The template for this tokenizer; raises `UserError` when the tokenizer lacks what it needs."""

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """All messages so far, and what comes before the assistant's next answer: what a model completes."""

    def find_end_ids(self) -> set[int]:
        """The tokens that end an answer."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a template puts between texts."""

    bos_id: int
    end_of_turn_id: int


class Segment(NamedTuple):
    """A stretch of text (`text` is set) or one special token (`token_id` is set), with or without loss."""

    text: str | None = None
    token_id: int | None = None
    has_loss: bool = False


@dataclass
class EncodedTurns:
    """A conversation in tokens.

    Attributes:
        loss_spans: half-open spans of `ids` that have loss.
        turn_ends: number of tokens up to the end of each turn.
        answers: whether each turn has loss.
    """

    ids: list[int] = field(default_factory=list)
    loss_spans: list[tuple[int, int]] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)
    answers: list[bool] = field(default_factory=list)


class TurnTemplate(ABC):
    """A template that writes each turn whatever the others are, and its texts each by itself.

    Args:
        special: ids that it puts between texts.
        encode_texts: encodes them.
    """

    # Texts that come again and again: they are encoded once.
    FIXED_TEXTS: ClassVar[Sequence[str]] = ()

    def __init__(self, special: SpecialTokens, encode_texts: EncodeTexts) -> None:
        self.special = special
        self._encode_texts = encode_texts
        self._fixed = dict(zip(self.FIXED_TEXTS, encode_texts(self.FIXED_TEXTS), strict=True))

    @abstractmethod
    def render_turns(self, messages: Sequence[Message]) -> list[list[Segment]]:
        """Segments by turn; what comes before the first turn belongs to it."""

    @abstractmethod
    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """All turns so far, then what comes before the assistant's next one."""

    def encode_conversations(self, conversations: Iterable[Sequence[Message]]) -> Iterator[EncodedTurns]:
        """The tokens of each conversation, in order; the texts of all are encoded in one batch."""
        return self._encode([self.render_turns(messages) for messages in conversations])

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        (encoded,) = self._encode([[self.render_prompt(messages)]])
        return encoded.ids

    def find_end_ids(self) -> set[int]:
        return {self.special.end_of_turn_id}

    def _encode(self, conversations: Sequence[Sequence[Sequence[Segment]]]) -> Iterator[EncodedTurns]:
        fixed_texts = self._fixed
        texts = [
            text
            for turns in conversations
            for segments in turns
            for text, _, _ in segments
            if text and text not in fixed_texts
        ]
        encoded = iter(self._encode_texts(texts))
        for turns in conversations:
            result = EncodedTurns()
            ids, loss_spans = result.ids, result.loss_spans
            for segments in turns:
                num_spans = len(loss_spans)
                for text, token_id, has_loss in segments:
                    start = len(ids)
                    if token_id is not None:
                        ids.append(token_id)
                    elif text:
                        fixed = fixed_texts.get(text)
                        ids.extend(next(encoded) if fixed is None else fixed)
                    if has_loss:
                        loss_spans.append((start, len(ids)))
                result.turn_ends.append(len(ids))
                result.answers.append(len(loss_spans) > num_spans)
            yield result


def encode_plain_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by itself: no BOS or EOS added, special-token strings taken as plain text."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
