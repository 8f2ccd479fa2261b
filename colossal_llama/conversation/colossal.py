"""The conversation template of this suite, the default of preparation and inference.

A conversation, drawn (both LLaMA versions; END is `</s>` for 2 and `<|eot_id|>` for 3):

    BOS  A chat between … questions.\\n\\nHuman:_  BOS  Hello  END  Assistant:_  BOS  Hi!  END
    ─────────────── no loss ─────────────────────────────────────────────────────  ── loss ──

Each stretch of text between two special tokens is encoded by itself, and the strings of special tokens inside
a user's text are plain text. torch is not imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from colossal_llama.conversation.control_tokens import find_named_token, find_token
from colossal_llama.conversation.form import CONTENT, Form
from colossal_llama.conversation.template import TurnTemplate
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
END_OF_TURN = {2: "</s>", 3: "<|eot_id|>"}


class ColossalTemplate(TurnTemplate):
    """`Human: ` and `Assistant: ` in plain text, BOS before a content and END after it."""

    @classmethod
    def describe(cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None) -> Form:
        """Without a version, the one that the tokenizer is made for."""
        version = llama_version or find_llama_version(tokenizer)
        bos, end = find_named_token(tokenizer, "bos_token"), END_OF_TURN[version]
        find_end_of_turn(tokenizer, version)
        return Form(
            name="colossal",
            version=version,
            opening=bos,
            system=f"{CONTENT}\n\n",
            default_system=DEFAULT_SYSTEM,
            human=f"Human: {bos}{CONTENT}{end}",
            header=f"Assistant: {bos}",
            answer=f"{CONTENT}{end}",
            end=end,
        )


def find_llama_version(tokenizer: PreTrainedTokenizerBase) -> int:
    """3 when the tokenizer has `<|eot_id|>`, else 2."""
    return 2 if find_token(tokenizer, END_OF_TURN[3]) is None else 3


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, llama_version: int) -> int:
    """Id of the token that ends a turn, looked up by name: LLaMA-3 base has another EOS than its chat turns.

    Raises:
        UserError: the tokenizer lacks it, or finds it in plain text too.
    """
    token_id = find_token(tokenizer, END_OF_TURN[llama_version])
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None and not added.special:
        raise UserError(
            f"{tokenizer.name_or_path}: {END_OF_TURN[llama_version]} is an ordinary added word, and a text "
            'that spells it would end the turn; give it "special": true in the tokenizer\'s files'
        )
    if token_id is None:
        others = [str(v) for v, name in END_OF_TURN.items() if find_token(tokenizer, name) is not None]
        remedy = f"use --llama_version {others[0]}" if others else "use a LLaMA tokenizer"
        raise UserError(
            f"--llama_version {llama_version}: turns end with {END_OF_TURN[llama_version]}, which the "
            f"tokenizer {tokenizer.name_or_path} does not have; {remedy}"
        )
    return token_id
