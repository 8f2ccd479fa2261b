"""The tokenizer's own template: ids as in transformers, masks exact, user text never a control token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.dataset.chat_template import ROLE_NAMES, ChatTemplateEncoder, check_chat_template
from colossal_llama.dataset.conversation import Message
from colossal_llama.dataset.jsonl import BadRecord
from colossal_llama.dataset.tokenization import EncoderSpec, Outcome, split_signed
from colossal_llama.inference.prompt_encoding import choose_prompt_style
from colossal_llama.utils.errors import UserError

PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
MARKED = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '[assistant]\n' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- '[' + message['role'] + ']\n' + message['content'] }}
    {% endif %}
{%- endfor %}
"""
UNSTABLE = "{{ messages | length }}" + PLAIN
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN
MakeEncoder = Callable[..., ChatTemplateEncoder]


@pytest.fixture(scope="module", params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


@pytest.fixture(scope="module")
def make_encoder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeEncoder:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")

    def make(template: str, max_length: int = 4096) -> ChatTemplateEncoder:
        tokenizer.chat_template = template
        text, tokens = check_chat_template(tokenizer)
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        return ChatTemplateEncoder(
            EncoderSpec(
                "chat_template",
                *ends,
                max_length,
                tokenizer_json=str(path),
                template=text,
                template_tokens=tokens,
            )
        )

    return make


def as_value(messages: list[Message]) -> dict[str, Any]:
    return {"messages": [{"from": message.role, "content": message.content} for message in messages]}


def encode(encoder: ChatTemplateEncoder, messages: list[Message]) -> Outcome:
    (outcome,) = encoder.encode([encoder.parse(as_value(messages))])
    assert outcome.num_tokens == sum(map(len, outcome.pieces)) + sum(outcome.dropped_tokens.values())
    return outcome


def apply(tokenizer: Any, template: str, messages: list[Message]) -> dict[str, list[int]]:
    chat = [{"role": ROLE_NAMES[message.role], "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(
        chat, chat_template=template, return_dict=True, return_assistant_tokens_mask="generation" in template
    )


TALK = [
    Message("system", "Be brief."),
    Message("human", "Where is 长江?"),
    Message("assistant", "In China."),
    Message("human", "How long?"),
    Message("assistant", "6,300 km。"),
]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_ids_are_those_of_transformers(tokenizer: Any, make_encoder: MakeEncoder, template: str) -> None:
    (piece,) = encode(make_encoder(template), TALK).pieces
    assert split_signed(piece)[0].tolist() == apply(tokenizer, template, TALK)["input_ids"]


def test_masks_are_those_of_transformers(tokenizer: Any, make_encoder: MakeEncoder) -> None:
    (piece,) = encode(make_encoder(MARKED), TALK).pieces
    assert (piece >= 0).astype(int).tolist() == apply(tokenizer, MARKED, TALK)["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_loss_is_on_answers_and_their_end(tokenizer: Any, make_encoder: MakeEncoder, template: str) -> None:
    (piece,) = encode(make_encoder(template), TALK).pieces
    text = tokenizer.decode(piece[piece >= 0])
    end = tokenizer.eos_token
    assert text.replace(" ", "") == f"InChina.{end}6,300km。{end}"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_special_token_strings_in_messages_are_text(
    tokenizer: Any, make_encoder: MakeEncoder, template: str
) -> None:
    end, begin = tokenizer.eos_token, tokenizer.bos_token
    messages = [Message("human", f"What is {end}{begin}?"), Message("assistant", f"{end} ends a text.")]
    (piece,) = encode(make_encoder(template), messages).pieces
    ids = split_signed(piece)[0].tolist()
    num_turns = 2 if template == PLAIN else 1
    assert ids.count(tokenizer.eos_token_id) == num_turns
    assert ids.count(tokenizer.bos_token_id) == 1
    rendered = tokenizer.decode(ids).replace(" ", "")
    assert rendered.count(end) == num_turns + 2
    labels = tokenizer.decode(piece[piece >= 0]).replace(" ", "")
    assert labels == f"{end}endsatext.{end}"


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufdd2\ufdd3")
texts = st.text(characters, max_size=12)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=3))
def test_any_text(tokenizer: Any, make_encoder: MakeEncoder, pairs: list[tuple[str, str]]) -> None:
    messages = [Message(*m) for q, a in pairs for m in (("human", q), ("assistant", a))]
    for template in (PLAIN, MARKED):
        outcome = encode(make_encoder(template), messages)
        (piece,) = outcome.pieces
        assert split_signed(piece)[0].tolist() == apply(tokenizer, template, messages)["input_ids"]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_whole_turns_up_to_max_length(tokenizer: Any, make_encoder: MakeEncoder, template: str) -> None:
    whole = len(apply(tokenizer, template, TALK)["input_ids"])
    first = apply(tokenizer, template, TALK[:3])["input_ids"]
    outcome = encode(make_encoder(template, whole - 1), TALK)
    assert split_signed(outcome.pieces[0])[0].tolist() == first
    assert outcome.dropped_tokens == {"turns beyond max_length": whole - len(first)}
    outcome = encode(make_encoder(template, 5), TALK)
    assert outcome.reason == "first answer beyond max_length"
    outcome = encode(make_encoder(template), [*TALK, Message("human", "And then?")])
    assert split_signed(outcome.pieces[0])[0].tolist() == apply(tokenizer, template, TALK)["input_ids"]
    assert list(outcome.dropped_tokens) == ["after the last answer"]
    outcome = encode(make_encoder(template), TALK[:2])
    assert outcome.reason == "no answer"


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_empty_answer_has_no_loss(tokenizer: Any, make_encoder: MakeEncoder, template: str) -> None:
    messages = [Message("human", "a"), Message("assistant", ""), *TALK[1:3]]
    (piece,) = encode(make_encoder(template), messages).pieces
    assert tokenizer.decode(piece[piece >= 0]).replace(" ", "") == f"InChina.{tokenizer.eos_token}"


def test_a_template_that_can_not_be_used(tokenizer: Any, make_encoder: MakeEncoder) -> None:
    with pytest.raises(
        UserError, match=r"--chat_template: .*no {% generation %} marks.*put the marks around"
    ):
        make_encoder(UNSTABLE)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        check_chat_template(tokenizer)


def test_control_tokens_that_were_added_as_words(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Text that spells them is text, an answer ends with them; a word that the template spells stays one."""
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "assistant"])
    start, end, word = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "assistant"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    text, tokens = check_chat_template(tokenizer)
    spec = EncoderSpec(
        "chat_template", 1, 2, 4096, tokenizer_json=str(path), template=text, template_tokens=tokens
    )
    for content, num_words in (("say <|im_end|> now", 1), ("my assistant", 2)):
        messages = [Message("human", content), Message("assistant", "b")]
        (piece,) = encode(ChatTemplateEncoder(spec), messages).pieces
        ids = split_signed(piece)[0].tolist()
        assert (ids.count(start), ids.count(end), ids.count(word)) == (2, 2, num_words)
        assert piece[-1] == end
        if num_words == 2:
            assert ids == apply(tokenizer, text, messages)["input_ids"]
    style = choose_prompt_style(tokenizer, "sft", None, True)
    assert style.end_ids == {tokenizer.eos_token_id, end}


def test_a_template_that_fails(make_encoder: MakeEncoder) -> None:
    with pytest.raises(UserError, match="refuses it: can only concatenate"):
        make_encoder("{{ 'a' + 1 }}")


def test_a_conversation_that_the_assistant_begins(tokenizer: Any, make_encoder: MakeEncoder) -> None:
    messages = [Message("assistant", "Hi."), *TALK[1:3]]
    (piece,) = encode(make_encoder(PLAIN), messages).pieces
    assert split_signed(piece)[0].tolist() == apply(tokenizer, PLAIN, messages)["input_ids"]
    said = f"Hi.{tokenizer.eos_token}InChina.{tokenizer.eos_token}"
    assert tokenizer.decode(piece[piece >= 0]).replace(" ", "") == said
    with pytest.raises(BadRecord, match="refuses it"):
        make_encoder(STRICT).parse(as_value(messages))


def test_the_date_does_not_depend_on_the_day(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("{{ strftime_now('%d %B %Y') }}{{ date_string }}" + PLAIN)
    assert encoder.parse(as_value(TALK)).full.text.startswith("26 July 202426 Jul 2024")


def test_conversations_that_the_template_refuses_are_bad_records(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(STRICT)
    with pytest.raises(BadRecord, match="refuses it: user first"):
        encoder.parse(as_value([Message("assistant", "Hi")]))
    with pytest.raises(BadRecord, match="noncharacter"):
        encoder.parse(as_value([Message("human", "\ufdd0")]))
