"""What prepared data says of the template that its rows are written in, so that the model can say it too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_llama.conversation.messages import Message, as_chat
from colossal_llama.conversation.template import TurnTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts on whose starts and ends tokenizers differ.
EXAMPLE = (
    Message("system", "Be brief."),
    Message("human", "What is 1 + 1?"),
    Message("assistant", " 2\n"),
    Message("human", "And 人 in English?"),
    Message("assistant", "Human, or person.  "),
)


@dataclass(frozen=True)
class CarriedTemplate:
    """A template by name and text.

    Attributes:
        name: in `TEMPLATES`; "tokenizer" for the tokenizer's own.
        text: in Jinja; None where the tokenizer's own is meant, or no text makes the rows.
        example_ids: what the text and the tokenizer make of `EXAMPLE`.
    """

    name: str
    text: str | None = None
    example_ids: tuple[int, ...] = ()

    @classmethod
    def of_template(cls, template: TurnTemplate) -> CarriedTemplate:
        text = template.chat_template()
        ids = () if text is None else tuple(template.encode_messages(EXAMPLE))
        return cls(template.form.name, text, ids)

    def as_json(self) -> dict[str, Any]:
        """For `prepared.json`."""
        if self.text is None:
            return {"name": self.name}
        return {"name": self.name, "chat_template": self.text, "example_ids": list(self.example_ids)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> CarriedTemplate:
        return cls(value["name"], value.get("chat_template"), tuple(value.get("example_ids", ())))

    def fits(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether a tokenizer makes the same tokens with the text as the one that prepared the data."""
        ids = tokenizer.apply_chat_template(as_chat(EXAMPLE), chat_template=self.text, tokenize=True)
        return tuple(ids) == self.example_ids
