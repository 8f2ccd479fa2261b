"""Finds the strings of special tokens in what messages say, where they are plain text."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from colossal_llama.conversation.messages import Message

NOTE = "special token's string as text"


class SpecialStrings:
    """Looks for any of a tokenizer's special tokens in messages."""

    def __init__(self, special_tokens: Sequence[str]) -> None:
        # Most texts don't hold even what all of the tokens begin with, which is found quickly.
        self.beginning = os.path.commonprefix(list(special_tokens))  # noqa: RUF071  (of strings)
        self.pattern = re.compile("|".join(map(re.escape, special_tokens)) or "(?!)")

    def are_in(self, messages: Sequence[Message]) -> bool:
        beginning, search = self.beginning, self.pattern.search
        return any(beginning in message.content and search(message.content) for message in messages)
