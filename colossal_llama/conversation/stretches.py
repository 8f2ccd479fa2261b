"""How a tokenizer encodes the stretches of text between special tokens.

LLaMA-2's tokenizers put a space of their own before a text. Inside of a conversation, behind a special token,
some do so too and some do not:

    text                      A            <s>A            <s> A
    legacy: true, LLaMA-3     ▁A  |  A     ▁A  |  A        ▁▁A  |  ▁A
    legacy: false             ▁A           A               ▁A

So that every stretch is encoded as it is alone, whatever the tokenizer, a `StretchRule` writes a space before
it where the tokenizer adds none. It is found by trying, and is a part of the Jinja text.

`tokenizers` encodes each stretch by itself, but for a prefix that it puts before the first alone: see
`follow_special_tokens`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Token ids of each text by itself: nothing added, and the strings of special tokens taken as plain text.
EncodeTexts = Callable[[Sequence[str]], Iterable[Sequence[int]]]
# The same of texts and positions, and how many tokens come before the first that ends beyond the position.
EncodeWithBorders = Callable[[Sequence[str], Sequence[int]], Iterable[tuple[Sequence[int], int]]]

STARTS = ("", " ", "  ", "▁", "▁ ", " ▁", "\t", "\n", "\n\n", "A", "人", "é", "\u200b", "1", "[", "<", "A: ")
ENDS = (
    "",
    " ",
    "  ",
    "▁",
    "A",
    " A",
    "  A",
    "▁A",
    "\n",
    "A ",
    "人",
    " 人",
    "🌊",
    "1",
    " 1",
    "'s",
    "]",
    "\nA",
)
MAX_WORDS = 64  # ordinary added tokens that are tried out
MAX_EXEMPT_WORDS = 256


@dataclass(frozen=True)
class StretchRule:
    """What is written before a text that follows a special token, so that it is encoded as it is alone.

    Attributes:
        adds_space: a space, unless the text is empty or starts with one of `exempt`.
    """

    adds_space: bool = False
    exempt: tuple[str, ...] = ()

    def write(self, text: str) -> str:
        if not self.adds_space or not text or text.startswith(self.exempt):
            return text
        return " " + text


PLAIN = StretchRule()


def probe_texts(words: Sequence[str]) -> list[str]:
    """Short texts on whose starts and ends tokenizers differ; `words`: ordinary added tokens."""
    texts = [start + end for start in STARTS for end in ENDS]
    for word in words[:MAX_WORDS]:
        texts += [word, f"{word}A", f"{word} A", f" {word}A", f"A{word}", f"A {word} A", f"{word}{word}"]
    return [text for text in dict.fromkeys(texts) if text]


def find_stretch_rule(
    alone: EncodeTexts, within: EncodeTexts, words: Sequence[str], texts: Sequence[str]
) -> StretchRule | None:
    """The rule under which every text is encoded behind a special token as it is alone; None if none does.

    Args:
        alone: encodes a text by itself.
        within: encodes a text as it is encoded behind a special token.
        words: ordinary added tokens. Some tokenizers put no prefix before them.
        texts: to try the rules on.
    """
    wanted = list(alone(texts))
    exempt = tuple(words[:MAX_EXEMPT_WORDS])
    for rule in (
        PLAIN,
        StretchRule(True, exempt),
        StretchRule(True, (" ", "▁", *exempt)),
    ):
        if list(within([rule.write(text) for text in texts])) == wanted:
            return rule
    return None


def follow_special_tokens(serialised: str) -> str:
    """A serialised tokenizer that encodes each text as the given one does behind a special token.

    Metaspace's "first" puts a prefix before the very first text alone. Everything else in a tokenizer looks
    at one stretch at a time.
    """
    if '"first"' not in serialised:
        return serialised
    value = json.loads(serialised)
    if not _drop_first_prefix(value.get("pre_tokenizer")):
        return serialised
    return json.dumps(value, ensure_ascii=False)


def _drop_first_prefix(component: Any) -> bool:
    """Sets "first" to "never", in place; whether there was any."""
    if not isinstance(component, dict):
        return False
    parts = [_drop_first_prefix(part) for part in component.get("pretokenizers", ())]
    if component.get("prepend_scheme") != "first":
        return any(parts)
    component["prepend_scheme"] = "never"
    return True


def plain_text_backend(serialised: str) -> Tokenizer:
    """A `tokenizers` tokenizer that adds, cuts and pads nothing; special tokens' strings are plain text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(serialised)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    return backend


def encode_plain_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text by itself: no BOS or EOS added, special-token strings taken as plain text."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encoder_within(tokenizer: PreTrainedTokenizerBase) -> EncodeTexts:
    """Encodes texts as the (fast) tokenizer does behind a special token."""
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    if pre_tokenizer is None or b'"first"' not in pre_tokenizer.__getstate__():
        return partial(encode_plain_texts, tokenizer)  # as alone
    backend = plain_text_backend(follow_special_tokens(tokenizer.backend_tokenizer.to_str()))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]

    return encode
