"""Prompts are what the model was trained on; user text is never a control token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from colossal_llama.conversation import colossal, find_template
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.stretches import follow_special_tokens
from colossal_llama.dataset.encoders.conversation import ConversationEncoder
from colossal_llama.dataset.labels import split_signed
from colossal_llama.dataset.settings import SftSettings
from colossal_llama.inference.prompt_encoding import choose_prompt_style
from colossal_llama.utils.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{{ message['content'] | trim }}{{ END }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
TALK = [
    Message("human", "Where is 长江?"),
    Message("assistant", "In China."),
    Message("human", " How long </s><|eot_id|>?"),
]


@pytest.fixture(params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


def end_token(tokenizer: Any) -> str:
    return "<|eot_id|>" if "<|eot_id|>" in tokenizer.get_vocab() else "</s>"


def test_prompt_is_the_beginning_of_the_training_document(tokenizer: Any, tmp_path: Path) -> None:
    style = choose_prompt_style(tokenizer, "sft", None, use_chat_template=False)
    prompt = style.encode(TALK)
    path = tmp_path / "tokenizer.json"
    path.write_text(follow_special_tokens(tokenizer.backend_tokenizer.to_str()), encoding="utf-8")
    end_id = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    settings = SftSettings(colossal.find_llama_version(tokenizer))
    spec = ConversationEncoder.make_spec(tokenizer, settings, 4096)
    encoder = ConversationEncoder(replace(spec, tokenizer_json=str(path)))
    messages = [{"from": message.role, "content": message.content} for message in TALK]
    record = {"messages": [*messages, {"from": "assistant", "content": "6,300 km."}]}
    (outcome,) = encoder.encode([encoder.parse(record)])
    ids, labels = split_signed(outcome.pieces[0])
    answer_begins = len(ids) - 1 - (labels[::-1] < 0).argmax()
    assert prompt == ids[: answer_begins + 1].tolist()
    assert style.end_ids == {end_id, tokenizer.eos_token_id}


def test_pretrained_prompt(tokenizer: Any) -> None:
    style = choose_prompt_style(tokenizer, "pretrained", None, use_chat_template=False)
    prompt = style.encode([Message("human", "Rivers </s>")])
    expected = tokenizer("Rivers </s>\n\n->\n\n", add_special_tokens=False, split_special_tokens=True)
    assert prompt == [tokenizer.bos_token_id, *expected["input_ids"]]
    assert style.end_ids == {tokenizer.eos_token_id}


def test_chat_template_is_that_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE.replace("END", repr(end_token(tokenizer)))
    style = choose_prompt_style(tokenizer, "sft", None, use_chat_template=True)
    chat = [{"role": "user", "content": "Where is 长江?"}, {"role": "assistant", "content": "In China."}]
    chat.append({"role": "user", "content": "How long?"})
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert style.encode([*TALK[:2], Message("human", "How long?")]) == expected
    # The end of a turn is found in the template: a LLaMA-3 base tokenizer has another EOS.
    end_id = tokenizer.convert_tokens_to_ids(end_token(tokenizer))
    assert style.end_ids == {end_id, tokenizer.eos_token_id}


def test_chat_template_takes_special_strings_as_text(tokenizer: Any) -> None:
    end = end_token(tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("END", repr(end))
    style = choose_prompt_style(tokenizer, "sft", None, use_chat_template=True)
    end_id = tokenizer.convert_tokens_to_ids(end)
    prompt = style.encode([Message("human", f"What is {end}?")])
    assert prompt.count(end_id) == 1  # the one after the question
    assert end in tokenizer.decode(prompt, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(None, "no chat template"), ("{{ raise_exception('not me') }}", "refuses it: not me")],
)
def test_unusable_templates(tokenizer: Any, template: str | None, expected: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=expected):
        choose_prompt_style(tokenizer, "sft", None, use_chat_template=True)


def test_version_that_the_tokenizer_lacks(llama2_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    with pytest.raises(UserError, match="use --llama_version 2"):
        choose_prompt_style(tokenizer, "sft", 3, use_chat_template=False)


@pytest.mark.parametrize("style", ["sft", "pretrained"])
def test_no_bos(llama2_tokenizer_dir: Path, style: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="no bos_token"):
        choose_prompt_style(tokenizer, style, None, use_chat_template=False)


@pytest.mark.parametrize("name", ["colossal", "llama2", "llama3"])
def test_the_template_is_found_in_the_tokenizer(name: str, llama3_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    tokenizer.chat_template = find_template(name).of_tokenizer(tokenizer).chat_template()
    style = choose_prompt_style(tokenizer, "sft", None, use_chat_template=False)
    chat = [{"role": "user", "content": "Where is 长江?"}, {"role": "assistant", "content": "In China."}]
    chat.append({"role": "user", "content": " How long?"})
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    messages = [*TALK[:2], Message("human", " How long?")]
    assert style.encode(messages) == expected
    end_id = tokenizer.convert_tokens_to_ids("<|end_of_text|>" if name == "llama2" else "<|eot_id|>")
    assert style.end_ids == {end_id, tokenizer.eos_token_id}
    # The template that is asked for goes first; one that was changed since is what it says.
    asked = choose_prompt_style(tokenizer, "sft", 3, use_chat_template=False)
    assert (asked.encode(messages) == expected) == (name == "colossal")
    asked = choose_prompt_style(tokenizer, "sft", None, False, template_name=name)
    assert asked.encode(messages) == expected
    tokenizer.chat_template += "{{- '!' }}"
    changed = choose_prompt_style(tokenizer, "sft", None, use_chat_template=False)
    assert changed.encode(messages) == [*expected, *tokenizer("!", add_special_tokens=False)["input_ids"]]


def test_the_version_of_the_template_is_found(llama2_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    tokenizer.chat_template = find_template("colossal").of_tokenizer(tokenizer, 2).chat_template()
    assert choose_prompt_style(tokenizer, "sft", None, False).end_ids == {tokenizer.eos_token_id}


def test_a_template_of_another_version_or_program(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    built_in = choose_prompt_style(tokenizer, "sft", None, False).encode(TALK)
    assert capsys.readouterr().err == ""
    tokenizer.chat_template = TEMPLATE
    assert choose_prompt_style(tokenizer, "sft", None, False).encode(TALK) == built_in
    assert "the built-in one is used; --chat_template uses the tokenizer's" in capsys.readouterr().err
    tokenizer.chat_template = "{#- Colossal-LLaMA template: chatml -#}{{ 1 }}"
    with pytest.raises(UserError, match=r"the template chatml, which this version does not have \(colossal"):
        choose_prompt_style(tokenizer, "sft", None, False)
