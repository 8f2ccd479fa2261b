"""One description of a conversation's form, from which everything else follows.

Training rows with their loss, prompts for generation (`template.py`) and the Jinja text for other programs
(`jinja_text.py`) are all made from a `Form`, so that they can't differ.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from colossal_llama.conversation.messages import Message

CONTENT = "\ufdd4"  # a noncharacter: stands for what a message says

MARKER = "Colossal-LLaMA template: "
NOT_ALTERNATING = "human and assistant do not take turns"
NO_SYSTEM = "there is no place for a system message"


@dataclass(frozen=True)
class Form:
    """How a conversation is written: special tokens spelled out, `CONTENT` in place of what is said.

    A text is the sum of its parts, white space included. All of `answer` has loss, and it ends with `end`. An
    answer without content is written too, but has no loss: there is nothing in it to learn but silence.

    Attributes:
        name: the template's, in `TEMPLATES`.
        version: of LLaMA, where the form depends on it.
        end: the special token that ends an answer.
        human: a human's message.
        header: what comes before an answer, where a prompt ends.
        answer: the answer itself.
        opening: before everything.
        system: a system message. One without content is left out.
        default_system: the content of a system message where there is none; None: nothing is written.
        system_inside: the system message is the beginning of what the first message says.
        trims: white space around what a message says is left out.
        alternates: human and assistant take turns, the human begins; other conversations are refused.
    """

    name: str
    end: str
    human: str
    header: str
    answer: str
    opening: str = ""
    system: str = ""
    default_system: str | None = None
    system_inside: bool = False
    trims: bool = False
    alternates: bool = False
    version: int | None = None

    def __post_init__(self) -> None:
        texts = (self.human, self.answer, self.system or CONTENT)
        assert all(text.count(CONTENT) == 1 for text in texts), "what is said is written once"
        assert self.answer.endswith(self.end), "a row can only be cut behind the end of an answer"

    def add_system(self, messages: Sequence[Message]) -> tuple[Sequence[Message], str]:
        """The messages that are written, and what goes into the first of them (see `system_inside`)."""
        if messages and messages[0].role == "system":
            system, turns = messages[0], messages[1:]
        elif self.default_system is not None:
            system, turns = Message("system", self.default_system), messages
        else:
            return messages, ""
        content = system.content
        if self.system_inside:
            return turns, self.system.replace(CONTENT, content) if content else ""
        if not (content.strip() if self.trims else content):
            return turns, ""
        return [system, *turns], ""

    def find_refusal(self, messages: Sequence[Message]) -> str | None:
        """Why the form has no place for this conversation; None if it has."""
        has_system = bool(messages) and messages[0].role == "system"
        if has_system and not self.system:
            return NO_SYSTEM
        turns = messages[1:] if has_system else messages
        if self.alternates and any(
            turn.role != ("human", "assistant")[number % 2] for number, turn in enumerate(turns)
        ):
            return NOT_ALTERNATING
        return None


def write_marker(form: Form) -> str:
    """What the first comment of a chat template says, by which inference finds the template again."""
    version = "" if form.version is None else f" for LLaMA {form.version}"
    return f"{MARKER}{form.name}{version}"


def read_marker(chat_template: str) -> tuple[str, int | None] | None:
    """Name and LLaMA version of the template that a Jinja text was made from; None if it is another one."""
    match = re.match(rf"\{{#- {MARKER}(\S+)(?: for LLaMA (\d+))? -#\}}", chat_template)
    return None if match is None else (match[1], match[2] and int(match[2]))
