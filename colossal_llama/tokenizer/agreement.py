"""Counts the texts on which the two forms of a LLaMA-2 tokenizer disagree, before and after its extension.

Slow: sentencepiece. Fast: the tokenizers library. They are loaded as transformers loads them and asked on a
fixed set of probe texts: special tokens, added words and new pieces, each behind and in front of spaces and
text, where the two are known to go separate ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STARTS = ("", " ", "  ", "▁", "\t", "\n", "A", "A ", "人")
ENDS = ("", " ", "  ", "   ", "▁", "A", " A", "  A", "▁A", "\tA", "\nA", "人")
MAX_TOKENS = 12  # special tokens, and as many other added ones
MAX_PIECES = 4


@dataclass(frozen=True)
class Disagreement:
    """A text and what the slow and the fast form make of it."""

    text: str
    slow: list[str]
    fast: list[str]

    def __str__(self) -> str:
        return f"{self.text!r}: slow {' '.join(self.slow)}, fast {' '.join(self.fast)}"


@dataclass(frozen=True)
class Agreement:
    """The outcome on the probe texts.

    Attributes:
        num_texts: how many there are.
        of_source: those on which the source's two forms disagree.
        new: those on which the source's agree and the extended tokenizer's do not.
    """

    num_texts: int
    of_source: list[Disagreement]
    new: list[Disagreement]

    def report(self) -> dict[str, Any]:
        """For the report file: counts, each with its first text."""
        return {
            "probe_texts": self.num_texts,
            "source_disagreements": len(self.of_source),
            "first_of_the_source": vars(self.of_source[0]) if self.of_source else None,
            "new_disagreements": len(self.new),
            "first_new": vars(self.new[0]) if self.new else None,
        }


def probe_texts(tokens: Iterable[str]) -> list[str]:
    """Every token, and none, between every start and end; every pair of tokens."""
    tokens = ["", *tokens]
    texts = [start + token + end for token in tokens for start in STARTS for end in ENDS]
    texts += [f"{first}{space}{second}" for first in tokens for second in tokens for space in ("", " ")]
    return list(dict.fromkeys(texts))


def compare_forms(source: Path, target: Path, pieces: Sequence[str]) -> Agreement:
    """Encodes the probe texts with both forms of both tokenizers, added tokens parsed, no BOS or EOS added.

    Args:
        source: directory of the source tokenizer.
        target: directory of the extended one.
        pieces: the new pieces; the first few take part.

    Raises:
        Exception: transformers can't load one of the tokenizers.
    """
    from transformers import LlamaTokenizer, LlamaTokenizerFast

    old, new = (
        [f.from_pretrained(d) for f in (LlamaTokenizer, LlamaTokenizerFast)] for d in (source, target)
    )
    special = old[0].all_special_tokens
    added = [token.content for token in old[0].added_tokens_decoder.values()]
    words = [token for token in added if token not in special]
    texts = probe_texts([*special[:MAX_TOKENS], *words[:MAX_TOKENS], *pieces[:MAX_PIECES]])

    def disagreements(forms: Sequence[PreTrainedTokenizerBase]) -> dict[str, Disagreement]:
        encoded = [form(texts, add_special_tokens=False, verbose=False).input_ids for form in forms]
        return {
            text: Disagreement(text, *(f.convert_ids_to_tokens(i) for f, i in zip(forms, ids, strict=True)))
            for text, *ids in zip(texts, *encoded, strict=True)
            if ids[0] != ids[1]
        }

    of_source = disagreements(old)
    found = [case for text, case in disagreements(new).items() if text not in of_source]
    return Agreement(len(texts), list(of_source.values()), found)
