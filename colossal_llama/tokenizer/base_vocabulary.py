"""The base of an extended tokenizer, made again from the extended one: what new pieces stand in place of.

An extension adds pieces and merges behind the source's and changes none of them, so without the new ones its
`tokenizer.json` encodes as the source does (but for a leading space, where a source is not sure).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_llama.tokenizer.tokenizer_files import FAST_FILE
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_base(directory: Path, new_rows: range) -> Tokenizer:
    """The tokenizer of a directory without its new ids.

    Raises:
        UserError: there is no `tokenizer.json`, or it is of another kind than those that are extended.
    """
    from tokenizers import Tokenizer

    path = directory / FAST_FILE
    fast = read_json_object(path)
    model = fast.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UserError(f"{path}: is no BPE tokenizer, so it is none that init_tokenizer.py extended")
    fast["model"] = {**model, **_without(model, new_rows)}
    return Tokenizer.from_str(json.dumps(fast))


def _without(model: Mapping[str, Any], new_rows: range) -> dict[str, Any]:
    vocabulary = {token: token_id for token, token_id in model["vocab"].items() if token_id not in new_rows}
    merges = []
    for merge in model["merges"]:
        parts = merge.split(" ", 1) if isinstance(merge, str) else merge
        if {*parts, "".join(parts)} <= vocabulary.keys():
            merges.append(merge)
    return {"vocab": vocabulary, "merges": merges}


def find_replaced_tokens(directory: Path, new_rows: range) -> dict[int, list[int]]:
    """New id -> the base's ids of its text, by itself: with no space before it and no special tokens."""
    base = load_base(directory, new_rows)
    vocabulary = read_json_object(directory / FAST_FILE)["model"]["vocab"]
    names = {token_id: token for token, token_id in vocabulary.items() if token_id in new_rows}
    return {
        token_id: [token.id for token in base.model.tokenize(names[token_id])] for token_id in sorted(names)
    }
