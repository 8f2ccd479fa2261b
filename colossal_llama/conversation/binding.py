"""A form for a tokenizer: which special tokens it has, and how texts between them are to be written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from colossal_llama.conversation.form import Form
from colossal_llama.conversation.stretches import (
    PLAIN,
    EncodeTexts,
    StretchRule,
    encode_plain_texts,
    encoder_within,
    find_stretch_rule,
    probe_texts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Around a special token: what follows one must not depend on what came before it, nor reach into it.
NEIGHBOURS = ("A", " A", "A ", " ", "  ", "\n", "▁", "人")


@dataclass(frozen=True)
class BoundForm:
    """All that a worker has to know of a template.

    Attributes:
        control_ids: the special tokens in the form's texts, and their ids.
        special_tokens: all special tokens of the tokenizer.
        rule: how stretches of text are written in a rendered text.
        is_writable: whether the tokenizer finds the special tokens in a text. Otherwise no text makes the
            rows: each stretch is encoded by itself.
        keeps_stretches: whether stretches are encoded as they are alone.
    """

    form: Form
    control_ids: tuple[tuple[str, int], ...]
    special_tokens: tuple[str, ...] = ()
    rule: StretchRule = PLAIN
    is_writable: bool = True
    keeps_stretches: bool = True

    def as_key(self) -> dict[str, Any]:
        """What the encoding depends on, beside the tokenizer."""
        return {"form": asdict(self.form), "rule": asdict(self.rule), "is_writable": self.is_writable}


def bind_form(form: Form, tokenizer: PreTrainedTokenizerBase) -> tuple[BoundForm, EncodeTexts]:
    """The form for this tokenizer, and what encodes the stretches of its texts."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    words = sorted(token.content for token in added if not token.special and token.content)
    texts = "".join((form.opening, form.system, form.human, form.header, form.answer))
    controls = special | {tokenizer.bos_token, tokenizer.eos_token, form.end}
    control_ids = {
        token: tokenizer.convert_tokens_to_ids(token) for token in sorted(controls - {None}) if token in texts
    }
    bound = BoundForm(
        form,
        tuple(control_ids.items()),
        tuple(sorted(token for token in special if token)),
    )
    alone = partial(encode_plain_texts, tokenizer)
    if not tokenizer.is_fast:
        return replace(bound, is_writable=False), alone
    within = encoder_within(tokenizer)
    if not _finds_control_tokens(tokenizer, within, control_ids):
        return replace(bound, is_writable=False), alone
    rule = find_stretch_rule(alone, within, words, probe_texts(words))
    if rule is None:
        return replace(bound, keeps_stretches=False), within
    return replace(bound, rule=rule), within


def _finds_control_tokens(
    tokenizer: PreTrainedTokenizerBase, within: EncodeTexts, control_ids: dict[str, int]
) -> bool:
    """Whether the tokenizer finds each of the tokens in a text, and leaves the texts around it alone."""
    neighbours = dict(zip(NEIGHBOURS, within(NEIGHBOURS), strict=True))
    texts, wanted = [], []
    first, first_id = next(iter(control_ids.items()))
    for token, token_id in control_ids.items():
        for before, before_ids in neighbours.items():
            for after, after_ids in neighbours.items():
                texts.append(f"{first}{before}{token}{after}")
                wanted.append([first_id, *before_ids, token_id, *after_ids])
    return tokenizer(texts, add_special_tokens=False)["input_ids"] == wanted
