"""The template token for token, and prompts that continue exactly where training samples do."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from colossal_llama.conversation import colossal
from colossal_llama.conversation.colossal import ColossalTemplate
from colossal_llama.conversation.messages import Message
from colossal_llama.conversation.stretches import encode_plain_texts
from colossal_llama.utils.errors import UserError

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.\n\n"
)


@pytest.fixture(params=[2, 3])
def version(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def tokenizer(version: int, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path):
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if version == 2 else llama3_tokenizer_dir)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_template_token_for_token(tokenizer, version: int) -> None:
    template = ColossalTemplate.of_tokenizer(tokenizer, version)
    messages = [
        Message("human", "Hello 你好"),
        Message("assistant", "Hi."),
        Message("human", "Bye"),
        Message("assistant", "See you"),
    ]
    turns = template.render_turns(messages)
    (encoded,) = template.encode_conversations([messages])
    ids = [encoded.ids[start:end].tolist() for start, end in pairwise([0, *encoded.turn_ends])]
    bos = tokenizer.convert_tokens_to_ids("<s>" if version == 2 else "<|begin_of_text|>")
    end = tokenizer.convert_tokens_to_ids("</s>" if version == 2 else "<|eot_id|>")
    human, assistant = encode(tokenizer, "Human: "), encode(tokenizer, "Assistant: ")
    assert ids == [
        [bos, *encode(tokenizer, SYSTEM + "Human: "), bos, *encode(tokenizer, "Hello 你好"), end],
        [*assistant, bos, *encode(tokenizer, "Hi."), end],
        [*human, bos, *encode(tokenizer, "Bye"), end],
        [*assistant, bos, *encode(tokenizer, "See you"), end],
    ]
    # Loss: an assistant's content and its END, not the BOS before it.
    assert [encoded.ids[start:end].tolist() for start, end in encoded.loss_spans] == [
        encode(tokenizer, "Hi."),
        [end],
        encode(tokenizer, "See you"),
        [end],
    ]
    assert encoded.answers == [False, True, False, True]
    assert [[s.has_loss for s in turn] for turn in turns] == [
        [False] * 5,
        [False, False, True, True],
        [False] * 4,
        [False, False, True, True],
    ]


def test_a_system_message_takes_the_place_of_the_default(tokenizer, version: int) -> None:
    template = ColossalTemplate.of_tokenizer(tokenizer, version)
    for content, expected in (("Be brief.", "Be brief.\n\nHuman: "), ("", "Human: ")):
        turns = template.render_turns([Message("system", content), Message("human", "x")])
        assert turns[0][1].text.removeprefix(" ") == expected


def test_special_token_strings_in_text_are_plain_text(tokenizer, version: int) -> None:
    end_id = colossal.find_end_of_turn(tokenizer, version)
    text = "a <s> b</s> <|eot_id|><|begin_of_text|> <unk> c"
    (ids,) = encode_plain_texts(tokenizer, [text])
    assert not set(ids) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert end_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_prompt_is_the_beginning_of_the_training_sample(tokenizer, version: int) -> None:
    template = ColossalTemplate.of_tokenizer(tokenizer, version)
    messages = [Message("human", "One?"), Message("assistant", "1"), Message("human", "Two </s>?")]
    prompt = template.encode_prompt(messages)
    (sample,) = template.encode_conversations([[*messages, Message("assistant", "2")]])
    assert sample.ids.tolist() == [*prompt, *encode(tokenizer, "2"), template.end_id]
    assert template.find_end_ids() == {template.end_id}


def test_prompt_without_turns(tokenizer, version: int) -> None:
    bos = tokenizer.bos_token_id
    template = ColossalTemplate.of_tokenizer(tokenizer, version)
    prompt = template.encode_prompt([Message("system", "Be brief.")])
    assert prompt == [bos, *encode(tokenizer, "Be brief.\n\nAssistant: "), bos]


def test_version_is_found_from_the_tokenizer(tokenizer, version: int) -> None:
    assert colossal.find_llama_version(tokenizer) == version


def test_an_end_of_turn_that_text_can_spell_is_refused(llama2_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer.add_tokens(["<|eot_id|>"])
    with pytest.raises(UserError, match="an ordinary added word"):
        colossal.find_end_of_turn(tokenizer, 3)
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    assert colossal.find_end_of_turn(tokenizer, 3) == 500


def test_wrong_version_names_the_flag_and_the_remedy(tokenizer, version: int) -> None:
    with pytest.raises(UserError, match=rf"--llama_version {5 - version}.*use --llama_version {version}"):
        colossal.find_end_of_turn(tokenizer, 5 - version)


def test_torch_is_not_imported() -> None:
    code = "import sys, colossal_llama.conversation.colossal; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
