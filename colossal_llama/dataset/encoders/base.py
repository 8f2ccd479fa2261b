"""What every kind of data set has: how its records are read and encoded, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from colossal_llama.dataset.settings import RecordSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from colossal_llama.conversation.binding import BoundForm
    from colossal_llama.conversation.carried import CarriedTemplate
    from colossal_llama.conversation.jinja import TemplateTokens

# What could be chosen when the names of cached shards were fixed: left out of them, so that they stay valid.
UNNAMED_CHOICES = {
    "conversation_template": ("colossal",),
    "long_documents": ("chunk", "truncate"),  # named as `truncate`
    "engine": ("hf",),
    "engine_version": ("",),
    "text_field": ("",),
    "bound_form": (None,),
}


@dataclass(frozen=True)
class EncoderSpec:
    """All that decides how a record becomes token ids; equal specs give equal documents.

    Args:
        kind: the encoder, a name in `ENCODERS`.
        bos_id, end_id: the ids added to a text: EOS after a document, or the end of a turn.
        max_length: longest piece, in tokens.
        tokenizer_json: path of the serialised fast tokenizer; its name is a digest of its content.
        long_documents: what becomes of them, a name in `LONG_DOCUMENTS` (pretrain).
        conversation_template: a name in `TEMPLATES` (sft).
        template, template_tokens: the tokenizer's own chat template, and its special tokens by name.
        engine, engine_version: what encodes texts, a name in `ENGINES`, and its package's version. The output
            does not depend on it, but one that turns out to be wrong must leave no shards for another.
        engine_json: the serialised tokenizer as the engine reads it, "" for `tokenizer_json`.
        text_field: the field that a record's text is in, "" for `source` and `target` (pretrain).
        bound_form: the template for the tokenizer (sft).
        carried: what the parts say of their template; encodes nothing.
    """

    kind: str
    bos_id: int
    end_id: int
    max_length: int
    tokenizer_json: str = ""
    long_documents: str = "chunk"
    conversation_template: str = "colossal"
    template: str = ""
    template_tokens: TemplateTokens = ()
    engine: str = "hf"
    engine_version: str = ""
    engine_json: str = ""
    text_field: str = ""
    bound_form: BoundForm | None = None
    carried: CarriedTemplate | None = None

    @property
    def follows_special_tokens(self) -> bool:
        """Whether each text that is encoded stands behind a special token."""
        return self.bound_form is not None and self.bound_form.is_writable

    @property
    def end_of_turn_ids(self) -> tuple[int, ...]:
        """What ends an answer; a template of the tokenizer's own shows it in its rows alone."""
        return (self.end_id,) if self.kind == "sft" else ()

    def as_key(self) -> dict[str, Any]:
        """What the encoding depends on: a tokenizer's content, wherever it is."""
        key = {
            **asdict(replace(self, bound_form=None, carried=None)),
            "bound_form": None if self.bound_form is None else self.bound_form.as_key(),
            "tokenizer_json": Path(self.tokenizer_json).name,
            "truncate": self.long_documents == "truncate",
        }
        del key["carried"], key["engine_json"]
        return {name: value for name, value in key.items() if value not in UNNAMED_CHOICES.get(name, ())}


@dataclass
class Outcome:
    """What became of a record: pieces to keep, and where every other token went.

    `num_tokens` is the sum of the pieces' lengths and of `dropped_tokens`. Without pieces the record is
    dropped for `reason`. `notes` are counted, nothing more.
    """

    num_tokens: int
    pieces: list[np.ndarray] = field(default_factory=list)
    dropped_tokens: dict[str, int] = field(default_factory=dict)
    reason: str | None = None
    notes: list[str] = field(default_factory=list)


class Record(Protocol):
    """What a data set's records have in common."""

    @property
    def category(self) -> str: ...

    @property
    def num_characters(self) -> int: ...

    @property
    def format(self) -> str:
        """The input format that it came in."""

    @property
    def text(self) -> str:
        """All of its text; records with equal texts are held out together."""

    def as_json(self) -> dict[str, Any]:
        """The record as a prepare script reads it."""


class RecordEncoder(Protocol):
    """One kind of data set: how its records are read and encoded."""

    fields: ClassVar[tuple[str, ...]]  # of a record, those that are read
    uses_engine: ClassVar[bool]  # that of the spec; off: `tokenizers` itself

    def __init__(self, spec: EncoderSpec) -> None: ...

    def parse(self, value: dict[str, Any]) -> Any:
        """The record in a JSON object; raises `BadRecord`."""

    @classmethod
    def make_spec(
        cls, tokenizer: PreTrainedTokenizerFast, settings: RecordSettings, max_length: int
    ) -> EncoderSpec:
        """What the encoder needs to know of a tokenizer; raises `UserError` when it can't be used."""

    @classmethod
    def report(cls, spec: EncoderSpec, tokenizer: PreTrainedTokenizerFast) -> None:
        """Says what a user should know of a spec; apart from `make_spec`, since it may take its time."""

    def encode(self, records: Sequence[Any]) -> list[Outcome]:
        """What becomes of each record, in order."""
