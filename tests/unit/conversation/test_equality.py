"""Training rows, prompts and `apply_chat_template` make the same tokens, for every template and tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversation_cases import KINDS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.conversation import TEMPLATES, find_template
from colossal_llama.conversation.binding import bind_form
from colossal_llama.conversation.colossal import DEFAULT_SYSTEM
from colossal_llama.conversation.messages import Message, as_chat
from colossal_llama.conversation.special_strings import SpecialStrings
from colossal_llama.conversation.stretches import (
    encode_plain_texts,
    follow_special_tokens,
    plain_text_backend,
    probe_texts,
)
from colossal_llama.conversation.template import TurnTemplate
from colossal_llama.dataset.template_report import find_slow_difference
from colossal_llama.utils.errors import UserError

PAIRS = [
    (name, kind)
    for name in TEMPLATES
    for kind in KINDS
    if name != "tokenizer" and (name != "llama3" or kind.startswith("llama3"))
]
SNIPPETS = [
    "river ",
    " The",
    "人工智能",
    "。",
    "\n",
    "\n\n",
    "  ",
    " ",
    "▁",
    "é",
    "🌊",
    "x",
    "1,250",
    "\u200b",
    "'s",
]
SNIPPETS += [
    "<think>",
    "</think>",
    "river!",
    "<|",
    "</",
    "[INST]",
    "<<SYS>>",
    "Human: ",
    "{{ x }}",
    "{%",
    '"\\',
]
texts = st.lists(st.sampled_from(SNIPPETS) | st.text(max_size=4), max_size=6).map("".join)
texts = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
contents = texts | st.sampled_from(probe_texts(["<think>", "river!"]))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns in order, so that every template takes them; they end with an answer."""
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [Message("human", draw(contents)), Message("assistant", draw(contents))]
    return messages


def make_template(name: str, tokenizer: Any) -> TurnTemplate:
    """The template as the workers of a preparation have it."""
    template = find_template(name)
    bound, _ = bind_form(template.describe(tokenizer), tokenizer)
    backend = plain_text_backend(follow_special_tokens(tokenizer.backend_tokenizer.to_str()))

    def encode(given_texts: Any) -> list[list[int]]:
        return [encoding.ids for encoding in encode_all(given_texts)]

    def encode_all(given_texts: Any) -> list[Any]:
        return backend.encode_batch(list(given_texts), add_special_tokens=False)

    def encode_with_borders(given_texts: Any, positions: Any) -> list[tuple[list[int], int]]:
        pairs = zip(encode_all(given_texts), positions, strict=True)
        return [(e.ids, sum(end <= position for _, end in e.offsets)) for e, position in pairs]

    return template(bound, encode, encode_with_borders)


@pytest.fixture(scope="module", params=PAIRS, ids=" with ".join)
def pair(request: pytest.FixtureRequest, tokenizer_dir: Callable[[str], Path]) -> tuple[TurnTemplate, Any]:
    name, kind = request.param
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir(kind))
    return make_template(name, tokenizer), tokenizer


def check_equal(template: TurnTemplate, tokenizer: Any, messages: list[Message]) -> None:
    text = template.chat_template()
    (row,) = template.encode_conversations([messages])
    out = tokenizer.apply_chat_template(
        as_chat(messages), chat_template=text, return_dict=True, return_assistant_tokens_mask=True
    )
    assert out["input_ids"] == row.ids.tolist()
    has_loss = [0] * len(row.ids)
    for start, end in row.loss_spans:
        has_loss[start:end] = [1] * (end - start)
    if template.bound.keeps_stretches:
        assert out["assistant_masks"] == has_loss
    # Else a token that the tokenizer adds to a text has no character, and transformers' mask leaves it out.
    prompt = template.encode_prompt(messages[:-1])
    assert prompt == tokenizer.apply_chat_template(
        as_chat(messages[:-1]), chat_template=text, add_generation_prompt=True
    )
    # A model completes the beginning of a row, and all that it says has loss.
    answer = messages[-1].content
    if answer.strip() if template.form.trims else answer:
        assert row.ids[: len(prompt)].tolist() == prompt
        assert not any(has_loss[: len(prompt)][-1:])
        assert all(has_loss[len(prompt) :])
        assert row.ids[-1] == template.end_id


@settings(max_examples=30)
@given(messages=conversations())
@example(messages=[Message("system", ""), Message("human", ""), Message("assistant", "")])
def test_rows_are_what_apply_chat_template_makes(
    pair: tuple[TurnTemplate, Any], messages: list[Message]
) -> None:
    if not SpecialStrings(pair[0].bound.special_tokens).are_in(messages):
        check_equal(*pair, messages)


# Minutes: thousands of conversations for each pair of template and tokenizer.
@pytest.mark.slow
@settings(max_examples=3000)
@given(messages=conversations())
def test_rows_of_thousands_of_conversations(pair: tuple[TurnTemplate, Any], messages: list[Message]) -> None:
    if not SpecialStrings(pair[0].bound.special_tokens).are_in(messages):
        check_equal(*pair, messages)


@settings(max_examples=30)
@given(messages=conversations())
def test_rows_are_those_of_the_first_version(any_tokenizer: Any, messages: list[Message]) -> None:
    """Every text between two special tokens encoded by itself, its special strings plain text."""
    template = make_template("colossal", any_tokenizer)
    assert template.bound.keeps_stretches == (any_tokenizer.kind != "first version")
    if not template.bound.keeps_stretches:
        return
    bos, end = any_tokenizer.bos_token_id, template.end_id
    opening, turns = DEFAULT_SYSTEM, messages
    if messages[0].role == "system":
        opening, turns = messages[0].content, messages[1:]
    opening = opening + "\n\n" if opening else ""
    expected = [bos]
    for turn in turns:
        header, said = encode_plain_texts(
            any_tokenizer, [f"{opening}{turn.role.capitalize()}: ", turn.content]
        )
        expected += [*header, bos, *said, end]
        opening = ""
    (row,) = template.encode_conversations([messages])
    assert row.ids.tolist() == expected


def test_special_strings_in_messages_stay_text(pair: tuple[TurnTemplate, Any]) -> None:
    template, tokenizer = pair
    special = [token for token in template.bound.special_tokens if token != tokenizer.unk_token]
    said = "a" + "a".join(special) + "a"
    messages = [Message("system", said), Message("human", said), Message("assistant", said)]
    assert SpecialStrings(template.bound.special_tokens).are_in(messages)
    (row,) = template.encode_conversations([messages])
    plain = [Message(message.role, "aa") for message in messages]
    ids = set(tokenizer.convert_tokens_to_ids(special))
    (without,) = template.encode_conversations([plain])
    assert [i for i in row.ids if i in ids] == [i for i in without.ids if i in ids]
    assert not SpecialStrings(template.bound.special_tokens).are_in(plain)


def test_a_template_whose_special_tokens_the_tokenizer_lacks(tokenizer_dir: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir("llama2"))
    with pytest.raises(UserError, match=r"--template llama3: needs the special token <\|start_header_id\|>"):
        find_template("llama3").of_tokenizer(tokenizer)


@pytest.mark.parametrize("kind", ["llama2", "llama2 extended", "legacy", "legacy extended", "prepend"])
def test_the_slow_tokenizer_makes_the_same_or_it_is_said(
    kind: str, tokenizer_dir: Callable[[str], Path]
) -> None:
    fast = AutoTokenizer.from_pretrained(tokenizer_dir(kind))
    slow = AutoTokenizer.from_pretrained(tokenizer_dir(kind), use_fast=False)
    template = make_template("colossal", fast)
    special = SpecialStrings(template.bound.special_tokens)
    choose = random.Random(0)
    all_texts = [*probe_texts([]), *SNIPPETS]

    def some_text() -> str:
        return "".join(choose.choices(all_texts, k=choose.randint(0, 3)))

    different = 0
    for _ in range(200):
        messages = [Message(role, some_text()) for role in ("human", "assistant") * 2]
        if not special.are_in(messages):
            ids = [
                tokenizer.apply_chat_template(as_chat(messages), chat_template=template.chat_template())
                for tokenizer in (slow, fast)
            ]
            different += ids[0] != ids[1]
    said = find_slow_difference(template, fast)
    assert (said is None) == (different == 0)
    assert said is None or "the first text that differs is '" in said
