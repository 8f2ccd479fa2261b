"""What a model is given to complete, and the tokens that end its answer, for each style of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.conversation import find_template
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.template import encode_plain_texts
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptEncoder = Callable[[Sequence[Message]], list[int]]
PRETRAINED_PROMPT_SUFFIX = "\n\n->\n\n"


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
    if tokenizer.bos_token_id is None and not use_chat_template:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no bos_token, which prompts begin with")
    if name == "pretrained" and not use_chat_template:

        def encode_text(messages: Sequence[Message]) -> list[int]:
            return encode_pretrained_prompt(tokenizer, messages[-1].content)

        return PromptStyle(encode_text, frozenset(end_ids))
    template = find_template("tokenizer" if use_chat_template else "colossal").of_tokenizer(
        tokenizer, llama_version
    )
    return PromptStyle(template.encode_prompt, frozenset(end_ids | template.find_end_ids()))


def encode_pretrained_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The prompt for a model that was only pre-trained: BOS, the text, `\\n\\n->\\n\\n`."""
    (ids,) = encode_plain_texts(tokenizer, [text + PRETRAINED_PROMPT_SUFFIX])
    return [tokenizer.bos_token_id, *ids]
