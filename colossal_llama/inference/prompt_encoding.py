"""What a model is given to complete, and the tokens that end its answer, for each style of prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from colossal_llama.conversation import TEMPLATES, find_template
from colossal_llama.conversation.form import read_marker
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.stretches import encode_plain_texts
from colossal_llama.inference.terminal import note
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from colossal_llama.conversation.template import Template

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
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    llama_version: int | None,
    use_chat_template: bool,
    template_name: str | None = None,
) -> PromptStyle:
    """The style that `--prompt_style`, `--llama_version`, `--chat_template` and `--template` ask for; without
    the last three, that of the template which training has written beside the tokenizer.

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
    if use_chat_template:
        template: Template = find_template("tokenizer").of_tokenizer(tokenizer)
    elif template_name is None and llama_version is None:
        template = find_own_template(tokenizer)
    else:
        template = find_template(template_name or "colossal").of_tokenizer(tokenizer, llama_version)
    return PromptStyle(template.encode_prompt, frozenset(end_ids | template.find_end_ids()))


def find_own_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of the model that the tokenizer belongs to, by the chat template that training wrote.

    Another chat template says nothing of how the model was trained here: then it is the built-in one, as it
    is without any.

    Raises:
        UserError: the template is none of this version's.
    """
    text = tokenizer.chat_template
    marker = read_marker(text) if isinstance(text, str) else None
    if marker is None:
        if text is not None:
            note(
                "the tokenizer's chat template was not written by this suite's training: the built-in one is "
                "used; --chat_template uses the tokenizer's"
            )
        return find_template("colossal").of_tokenizer(tokenizer)
    name, version = marker
    if name not in TEMPLATES:
        raise UserError(
            f"{tokenizer.name_or_path}: the model was trained with the template {name}, which this version "
            f"does not have ({', '.join(TEMPLATES)}); use --chat_template to take its text as it is"
        )
    template = find_template(name).of_tokenizer(tokenizer, version)
    if template.chat_template() != text and tokenizer.is_fast:
        # Changed since, or written for another tokenizer: what other programs read counts.
        return find_template("tokenizer").of_tokenizer(tokenizer)
    return template


def encode_pretrained_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The prompt for a model that was only pre-trained: BOS, the text, `\\n\\n->\\n\\n`."""
    (ids,) = encode_plain_texts(tokenizer, [text + PRETRAINED_PROMPT_SUFFIX])
    return [tokenizer.bos_token_id, *ids]
