"""Token ids to text, as they come.

A token is not always a text: a character outside the vocabulary arrives as several byte tokens, and the space
in front of a sentencepiece token is lost when it is decoded alone. So each new token is decoded together with
the ones before it, and only what can't change any more is given out:

    token       decoded with the one before     given out
    ▁The        The                             The
    ▁           The_                            _
    <0xE9>      _�                              (waits: the character is not complete)
    <0x95>      _��                             (waits)
    <0xBF>      _长                             长
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


class StreamDecoder:
    """Turns tokens into pieces of text whose sum is what the tokenizer decodes from all of them.

    Special tokens give no text. Bytes that never become a character come out as U+FFFD.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Tokens whose text was given out already; they shield the next token's leading space.
        self.context: list[int] = []
        self.waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that is certain with this token; often "", sometimes more than one character."""
        self.waiting.append(token_id)
        text = self._decode_waiting()
        if text.endswith(REPLACEMENT):
            return ""
        return self._give_out(text)

    def finish(self) -> str:
        """What is left when no token follows."""
        return self._give_out(self._decode_waiting())

    def _decode_waiting(self) -> str:
        before = self._decode(self.context)
        after = self._decode(self.context + self.waiting)
        if after.startswith(before):
            return after[len(before) :]
        # A stray byte after complete characters made of bytes: decoders give up on the whole run of bytes,
        # but the characters before the stray byte have been read already.
        return self._decode(self.waiting)

    def _give_out(self, text: str) -> str:
        # A token without text (a special one) shields no space: the old context stays in front of it.
        if text:
            self.context = self.waiting
        else:
            self.context = self.context + self.waiting
        self.waiting = []
        return text

    def _decode(self, ids: list[int]) -> str:
        # Clean-up would take spaces out of the answer ("a ." becomes "a.").
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
