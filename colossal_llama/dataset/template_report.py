"""What is to be said of a conversation template before data is prepared with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.conversation.messages import Message, as_chat
from colossal_llama.conversation.special_strings import SpecialStrings
from colossal_llama.conversation.stretches import probe_texts
from colossal_llama.conversation.template import TurnTemplate
from colossal_llama.utils.console import log, warn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE_FILE = "tokenizer.model"


def report_template(template: TurnTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where no chat template makes the rows, or another tokenizer of the directory makes other ones."""
    name, bound = tokenizer.name_or_path, template.bound
    if not bound.is_writable:
        warn(
            f"{name}: no chat template can make the rows with this tokenizer, which does not find "
            f"{' and '.join(token for token, _ in bound.control_ids)} in a text, or changes the text around "
            "them (normalized, lstrip or rstrip of its added tokens?); trained models get none"
        )
        return
    if not bound.keeps_stretches:
        log(
            f"{name}: texts behind a special token are encoded otherwise than alone, whatever is written "
            "before them; rows are what apply_chat_template makes, other ones than in earlier versions"
        )
    if difference := find_slow_difference(template, tokenizer):
        warn(f"{name}: {difference}")


def find_slow_difference(template: TurnTemplate, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first text that transformers' slow tokenizer encodes otherwise in a conversation; None if there is
    none, or no slow tokenizer.
    """
    from transformers import AutoTokenizer

    directory = Path(tokenizer.name_or_path)
    if not (directory / SENTENCEPIECE_FILE).is_file():
        return None
    try:
        slow = AutoTokenizer.from_pretrained(
            directory, use_fast=False, local_files_only=True, trust_remote_code=False
        )
    except Exception:  # of sentencepiece and of transformers, of any kind: there is none that could be used
        return None
    if slow.is_fast:
        return None
    added = tokenizer.added_tokens_decoder.values()
    special = SpecialStrings(template.bound.special_tokens)
    chat_template = template.chat_template()
    for text in probe_texts([token.content for token in added if not token.special]):
        messages = [Message("system", text), Message("human", text), Message("assistant", text)]
        if special.are_in(messages):
            continue
        ids = [
            each.apply_chat_template(as_chat(messages), chat_template=chat_template)
            for each in (slow, tokenizer)
        ]
        if ids[0] != ids[1]:
            first = next(i for i, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
            shown = [" ".join(tokenizer.convert_ids_to_tokens(i[first : first + 4])) for i in ids]
            return (
                "transformers' slow tokenizer encodes conversations otherwise than the fast one, which makes "
                f"the rows; the first text that differs is {text!r}: slow {shown[0]}, fast {shown[1]}"
            )
    return None
