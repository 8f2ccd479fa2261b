"""The template that docs/development.md adds as an example, in the place of one of the registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import test_equality as equality
from conversation_cases import KINDS
from support import documented_examples
from transformers import AutoTokenizer

from colossal_llama.conversation.messages import Message


@pytest.mark.parametrize("kind", KINDS)
def test_its_rows_are_those_of_apply_chat_template(
    kind: str, tokenizer_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = documented_examples()["ZephyrTemplate"]
    monkeypatch.setattr(equality, "find_template", lambda name: template)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir(kind))
    messages = [Message("human", "Where is the river?"), Message("assistant", "Behind the hill.")]
    equality.check_equal(equality.make_template("zephyr", tokenizer), tokenizer, messages)
