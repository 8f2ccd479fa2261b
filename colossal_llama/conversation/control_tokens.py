"""Which added tokens a template means as control tokens, and a tokenizer that knows them by other names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from colossal_llama.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENAMED = "\ufdd3"  # a noncharacter: no text that is encoded holds it


def is_mark(token: str) -> bool:
    """Whether an added token that is not said to be special looks like one, `<|im_end|>` for instance.

    A template that writes such a token means it as a control token, however it was added to the vocabulary.
    """
    ends = token[:1] + token[-1:]
    return len(token) > 2 and not any(character.isalnum() or character.isspace() for character in ends)


def is_tag(token: str, ordinary: Collection[str]) -> bool:
    """Whether an ordinary added token is one of a pair like `<think>` and `</think>`.

    Those are a part of what is said: the tokenizer finds them in messages as `apply_chat_template` does.
    """
    match = re.fullmatch(r"</?([\w-]+)>", token)
    return match is not None and {f"<{match[1]}>", f"</{match[1]}>"} <= set(ordinary)


def renamed(index: int) -> str:
    """The name under which the encoding tokenizer knows the special token with this index."""
    return f"{RENAMED}{index}{RENAMED}"


def rename_special_tokens(backend: Tokenizer, special_tokens: Sequence[str]) -> Tokenizer:
    """A copy whose special tokens have the names of `renamed`, so that their own strings are plain text.

    The ids, and everything else in which the tokenizers encode text, are the same.
    """
    names = {token: renamed(index) for index, token in enumerate(special_tokens)}
    value = json.loads(backend.to_str())
    for added in value["added_tokens"]:
        added["content"] = names.get(added["content"], added["content"])
    model = value["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    copy = plain_copy(json.dumps(value))
    assert all(copy.token_to_id(name) == backend.token_to_id(token) for token, name in names.items())
    return copy


def plain_copy(serialised: str) -> Tokenizer:
    """A tokenizer that adds, cuts and pads nothing."""
    copy = Tokenizer.from_str(serialised)
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    return copy


def find_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token; None if the tokenizer does not have it."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    if token_id is None or (token_id == tokenizer.unk_token_id and token != tokenizer.unk_token):
        return None
    return token_id


def find_named_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    """The string of `bos_token` or `eos_token`; `UserError` where the tokenizer has none."""
    token = getattr(tokenizer, name)
    if token is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer has no {name}, which the template needs")
    return token


def find_control_token(tokenizer: PreTrainedTokenizerBase, token: str, template: str) -> int:
    """The id of a special token that a template needs.

    Raises:
        UserError: the tokenizer lacks it, or finds it in plain text too.
    """
    token_id = find_token(tokenizer, token)
    if token_id is None:
        raise UserError(
            f"--template {template}: needs the special token {token}, which the tokenizer "
            f"{tokenizer.name_or_path} does not have; use --template colossal"
        )
    added = tokenizer.added_tokens_decoder.get(token_id)
    if added is None or not added.special:
        raise UserError(
            f"{tokenizer.name_or_path}: {token} is an ordinary added word, and a text that spells it would "
            'be taken for it; give it "special": true in the tokenizer\'s files'
        )
    return token_id
