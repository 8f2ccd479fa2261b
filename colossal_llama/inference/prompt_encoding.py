"""What a model is given to complete, and the tokens that end its answer, for each style of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.dataset.chat_template import MARKS, TemplateRenderer
from colossal_llama.dataset.conversation import (
    Message,
    encode_chat_prompt,
    encode_pretrained_prompt,
    find_end_of_turn,
    find_llama_version,
)
from colossal_llama.dataset.jsonl import BadRecord
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PromptEncoder = Callable[[Sequence[Message]], list[int]]


@dataclass(frozen=True)
class PromptStyle:
    """`encode` makes the prompt for the answer to the last message; the answer ends at one of `end_ids`.

    The model's generation configuration may name further tokens that end an answer.
    """

    encode: PromptEncoder
    end_ids: frozenset[int]


def choose_prompt_style(
    tokenizer: PreTrainedTokenizerBase, name: str, llama_version: int | None, use_chat_template: bool
) -> PromptStyle:
    """The style that `--prompt_style`, `--llama_version` and `--chat_template` ask for.

    Raises:
        UserError: the tokenizer lacks a token or the template that the style needs.
    """
    end_ids = {tokenizer.eos_token_id} - {None}
    if use_chat_template:
        template = TemplatePrompts(tokenizer)
        return PromptStyle(template.encode, frozenset(end_ids | template.find_end_ids()))
    if tokenizer.bos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no bos_token, which prompts begin with")
    if name == "pretrained":

        def encode_text(messages: Sequence[Message]) -> list[int]:
            return encode_pretrained_prompt(tokenizer, messages[-1].content)

        return PromptStyle(encode_text, frozenset(end_ids))
    version = llama_version or find_llama_version(tokenizer)

    def encode_messages(messages: Sequence[Message]) -> list[int]:
        return encode_chat_prompt(tokenizer, messages, version)

    return PromptStyle(encode_messages, frozenset(end_ids | {find_end_of_turn(tokenizer, version)}))


class TemplatePrompts(TemplateRenderer):
    """Prompts in the tokenizer's own chat template; special-token strings inside messages are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        where = f"--chat_template: {tokenizer.name_or_path}"
        if not tokenizer.is_fast:
            raise UserError(f"{where}: {type(tokenizer).__name__} is not a fast tokenizer")
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            raise UserError(f"{where}: this tokenizer has no chat template; leave the flag out") from None
        super().__init__(tokenizer, template)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages and of what the template writes in front of an answer."""
        return self._encode(messages, add_generation_prompt=True)

    def find_end_ids(self) -> set[int]:
        """The special token that the template writes after an answer, if it writes one.

        It need not be the tokenizer's EOS: LLaMA-3 base tokenizers have another one.
        """
        question, answer = Message("human", "a"), Message("assistant", "b")
        prompt = self._encode([question], add_generation_prompt=True)
        full = self._encode([question, answer], add_generation_prompt=False)
        special_ids = set(self.tokenizer.convert_tokens_to_ids(self.special_tokens))
        return set([token_id for token_id in full[len(prompt) :] if token_id in special_ids][:1])

    def _encode(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        if any(MARKS.search(message.content) for message in messages):
            raise UserError("the prompt holds a Unicode noncharacter (U+FDD0 to U+FDD3); leave it out")
        try:
            rendered = self.render(messages, False, add_generation_prompt)
        except BadRecord as error:
            raise UserError(f"--chat_template: {error}") from None
        return self.encode_rendered([rendered])[0].ids
