"""The conversation template of this suite, the default of preparation and inference.

A conversation, drawn (both LLaMA versions; END is `</s>` for 2 and `<|eot_id|>` for 3):

    BOS  A chat between … questions.\\n\\nHuman:_  BOS  Hello  END  Assistant:_  BOS  Hi!  END
    ─────────────── no loss ─────────────────────────────────────────────────────  ── loss ──

Each stretch of text between two special tokens is encoded by itself, and the strings of special tokens inside
a user's text are plain text. torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.template import Segment, SpecialTokens, TurnTemplate, encode_plain_texts
from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
SYSTEM_END = "\n\n"
HEADERS = {"human": "Human: ", "assistant": "Assistant: "}
END_OF_TURN = {2: "</s>", 3: "<|eot_id|>"}


class ColossalTemplate(TurnTemplate):
    """`Human: ` and `Assistant: ` in plain text, BOS before a content and END after it."""

    FIXED_TEXTS = (*HEADERS.values(), *(DEFAULT_SYSTEM + SYSTEM_END + header for header in HEADERS.values()))

    @classmethod
    def of_tokenizer(
        cls, tokenizer: PreTrainedTokenizerBase, llama_version: int | None = None
    ) -> ColossalTemplate:
        """Without a version, the one that the tokenizer is made for."""
        special = find_special_tokens(tokenizer, llama_version or find_llama_version(tokenizer))
        return cls(special, partial(encode_plain_texts, tokenizer))

    def render_turns(self, messages: Sequence[Message]) -> list[list[Segment]]:
        """Segments by turn (system messages are no turns); BOS and the system text belong to the first turn.

        Loss is on an assistant's content and its END. An assistant message without content has no loss: there
        is nothing in it to learn but silence.
        """
        special = self.special
        opening, turns = render_opening(messages)
        rendered = []
        for index, turn in enumerate(turns):
            has_loss = turn.role == "assistant" and bool(turn.content)
            segments = [Segment(token_id=special.bos_id)] if index == 0 else []
            segments += [
                Segment(text=(opening if index == 0 else "") + HEADERS[turn.role]),
                Segment(token_id=special.bos_id),
                Segment(text=turn.content, has_loss=has_loss),
                Segment(token_id=special.end_of_turn_id, has_loss=has_loss),
            ]
            rendered.append(segments)
        return rendered

    def render_prompt(self, messages: Sequence[Message]) -> list[Segment]:
        """All turns so far, then the header of the assistant's next turn."""
        special = self.special
        segments = [segment for turn in self.render_turns(messages) for segment in turn]
        if segments:
            header = [Segment(text=HEADERS["assistant"])]
        else:
            opening, _ = render_opening(messages)
            header = [Segment(token_id=special.bos_id), Segment(text=opening + HEADERS["assistant"])]
        return [*segments, *header, Segment(token_id=special.bos_id)]


def render_opening(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The text before the first turn's header, and the turns.

    A leading `system` message takes the place of the default sentence; an empty one leaves no text at all.
    """
    if messages and messages[0].role == "system":
        content = messages[0].content
        return content + SYSTEM_END if content else "", messages[1:]
    return DEFAULT_SYSTEM + SYSTEM_END, messages


def find_llama_version(tokenizer: PreTrainedTokenizerBase) -> int:
    """3 when the tokenizer has `<|eot_id|>`, else 2."""
    return 2 if _find_token(tokenizer, END_OF_TURN[3]) is None else 3


def find_end_of_turn(tokenizer: PreTrainedTokenizerBase, llama_version: int) -> int:
    """Id of the token that ends a turn, looked up by name: LLaMA-3 base has another EOS than its chat turns.

    Raises:
        UserError: the tokenizer lacks it, or finds it in plain text too.
    """
    token_id = _find_token(tokenizer, END_OF_TURN[llama_version])
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is not None and not added.special:
        raise UserError(
            f"{tokenizer.name_or_path}: {END_OF_TURN[llama_version]} is an ordinary added word, and a text "
            'that spells it would end the turn; give it "special": true in the tokenizer\'s files'
        )
    if token_id is None:
        others = [str(v) for v, name in END_OF_TURN.items() if _find_token(tokenizer, name) is not None]
        remedy = f"use --llama_version {others[0]}" if others else "use a LLaMA tokenizer"
        raise UserError(
            f"--llama_version {llama_version}: turns end with {END_OF_TURN[llama_version]}, which the "
            f"tokenizer {tokenizer.name_or_path} does not have; {remedy}"
        )
    return token_id


def find_special_tokens(tokenizer: PreTrainedTokenizerBase, llama_version: int) -> SpecialTokens:
    """BOS and the end-of-turn token of the tokenizer at hand; `UserError` when it lacks one of them."""
    if tokenizer.bos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no bos_token, which the template needs")
    return SpecialTokens(tokenizer.bos_token_id, find_end_of_turn(tokenizer, llama_version))


def _find_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return None
    return token_id
