"""The tokenizer's own template: ids as in transformers, masks exact, user text never a control token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from encoder_cases import SNIPPETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.conversation.jinja import JinjaTemplate, TemplateTokens, only_writes
from colossal_llama.conversation.messages import ROLE_NAMES, Message
from colossal_llama.corpus.records import BadRecord
from colossal_llama.dataset.encoders.base import EncoderSpec, Outcome
from colossal_llama.dataset.encoders.own_template import ChatTemplateEncoder, find_tokens
from colossal_llama.dataset.labels import split_signed
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
HIDDEN = PLAIN.replace("{{ message['content'] | trim }}", "{{ message['content'] * (messages | length) }}")
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + PLAIN
MakeEncoder = Callable[..., ChatTemplateEncoder]


def check_chat_template(tokenizer: Any) -> tuple[str, TemplateTokens]:
    template = JinjaTemplate.of_tokenizer(tokenizer)
    template.check()
    return template.template, template.tokens()


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
        chat,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask="endgeneration" in template,
    )


LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '[' + message['role'] + ']\n\n' + message['content'] | trim + eos_token %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
SYSTEM_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '[system]\nYou help.' + eos_token }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
# As in QwQ and DeepSeek-R1: what was thought is left out of all answers but the last.
THINK = (
    "{% for m in messages %}{% set content = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '[' + m['role'] + ']\n' + content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
# As in Qwen3: an empty thought is written where there is none, after the last question only.
EMPTY_THOUGHT = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m['content'] %}{% set thought = '' %}"
    "{% if m['role'] == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '[' + m['role'] + ']\n' }}{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
# The prompt begins a thought, which the history does not hold.
THINKING_PROMPT = THINK.replace("'[assistant]\n' }}", "'[assistant]\n<think>\n' }}")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LOOKS = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' }}{% if 'river' in m['content'] %}{{ '(water) ' }}"
    "{% endif %}{{ m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
MARKED_THINK = (
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] | trim }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
COUNTED = "{{ messages | length }}" + PLAIN
TEMPLATES = {
    "plain": PLAIN,
    "marked": MARKED,
    "llama3": LLAMA3,
    "system default": SYSTEM_DEFAULT,
    "think": THINK,
    "empty thought": EMPTY_THOUGHT,
    "thinking prompt": THINKING_PROMPT,
    "mistral": MISTRAL,
    "looks": LOOKS,
    "marked think": MARKED_THINK,
    "counted": COUNTED,
    "strict": STRICT,
}

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
    outcome = encode(make_encoder(template), messages)
    assert outcome.notes == ["special token's string as text"]  # here apply_chat_template gives other ids
    (piece,) = outcome.pieces
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


pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "\n",
        "\n\n",
        " ",
        "river",
        "Where is 长江?",
        "a",
        "é",
        "[assistant]\n",
        "🌊",
        "x y",
    ]
)
contents = st.lists(pieces, max_size=6).map("".join)
conversations = st.lists(
    st.tuples(st.sampled_from(["human", "assistant"]), contents), min_size=1, max_size=5
) | st.integers(1, 3).flatmap(
    lambda n: st.tuples(*[contents] * (2 * n)).map(
        lambda texts: [(("human", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    )
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.none() | contents, turns=conversations, data=st.data())
def test_ids_are_always_those_of_transformers(
    tokenizer: Any, make_encoder: MakeEncoder, name: str, system: str | None, turns: list, data: Any
) -> None:
    """Whole, or cut to whole turns; or the template itself refuses the conversation."""
    template = TEMPLATES[name]
    messages = [Message(*turn) for turn in ([("system", system)] if system is not None else []) + turns]
    answers = [i + 1 for i, m in enumerate(messages) if m.role == "assistant" and m.content]
    encoder = make_encoder(template, data.draw(st.sampled_from([20, 60, 4096])))
    outcome = encode(encoder, messages)
    try:
        apply(tokenizer, template, messages)
        wanted = [apply(tokenizer, template, messages[:end]) for end in reversed(answers)]
    except jinja2.TemplateError:
        assert outcome.reason == "refused by the chat template"
        return
    if not answers:
        assert outcome.reason == "no answer"
        return
    fitting = [value for value in wanted if len(value["input_ids"]) <= encoder.max_length]
    if not fitting:
        assert outcome.reason == "first answer beyond max_length"
        return
    (piece,) = outcome.pieces
    assert split_signed(piece)[0].tolist() == fitting[0]["input_ids"]
    if "assistant_masks" in fitting[0] and all(m.content for m in messages):
        assert (piece >= 0).astype(int).tolist() == fitting[0]["assistant_masks"]


def said(tokenizer: Any, piece: Any) -> str:
    return tokenizer.decode(piece[piece >= 0]).replace(" ", "")


THOUGHTS = [
    Message("human", "a"),
    Message("assistant", "<think>\nb\n</think>\n\nc"),
    Message("human", "d"),
    Message("assistant", "<think>\ne\n</think>\n\nf"),
]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("think", "c", "<think>\ne\n</think>\n\nf"),
        ("empty thought", "c", "<think>\ne\n</think>\n\nf"),
        ("thinking prompt", "c", "e\n</think>\n\nf"),  # what the prompt begins is not learned
        ("marked think", "c", "<think>\ne\n</think>\n\nf"),
        ("counted", "<think>\nb\n</think>\n\nc", "<think>\ne\n</think>\n\nf"),
    ],
)
def test_loss_is_on_what_is_left_of_an_answer(
    tokenizer: Any, make_encoder: MakeEncoder, name: str, first: str, last: str
) -> None:
    encoder = make_encoder(TEMPLATES[name])
    (piece,) = encode(encoder, THOUGHTS).pieces
    end = tokenizer.eos_token
    after = "\n" if name not in ("marked think", "counted") else ""
    assert said(tokenizer, piece) == f"{first}{end}{after}{last}{end}{after}"
    # Alone, the first answer is the last one, with all that was thought.
    (alone,) = encode(encoder, THOUGHTS[:2]).pieces
    whole = "<think>\nb\n</think>\n\nc" if name != "thinking prompt" else "b\n</think>\n\nc"
    assert said(tokenizer, alone) == f"{whole}{end}{after}"


def test_a_special_token_that_the_template_looks_for(tokenizer: Any, make_encoder: MakeEncoder) -> None:
    """Which of them are the template's can't be told: better a bad record than a control token in a text."""
    end = tokenizer.eos_token
    template = PLAIN.replace("message['content']", f"message['content'].split('{end}')[-1]")
    encoder = make_encoder(template)
    assert encode(encoder, TALK).pieces
    with pytest.raises(BadRecord, match="looks at what messages hold"):
        encoder.parse(as_value([Message("human", f"a{end}b"), Message("assistant", "c")]))


def test_added_tokens_that_are_part_of_what_is_said(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    """`<think>` in Qwen's tokenizers: not special, and in messages what `apply_chat_template` makes of it."""
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = EMPTY_THOUGHT
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    text, tokens = check_chat_template(tokenizer)
    spec = EncoderSpec(
        "chat_template", 1, 2, 4096, tokenizer_json=str(path), template=text, template_tokens=tokens
    )
    (piece,) = encode(ChatTemplateEncoder(spec), THOUGHTS).pieces
    ids = split_signed(piece)[0].tolist()
    assert ids == apply(tokenizer, text, THOUGHTS)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<think>")) == 1
    style = choose_prompt_style(tokenizer, "sft", None, True)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": THOUGHTS[1].content}],
        add_generation_prompt=True,
    )
    assert style.encode(THOUGHTS[:2]) == prompt


def test_all_special_tokens_that_a_template_may_name(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        llama3_tokenizer_dir,
        additional_special_tokens=["<|eot_id|>"],
        extra_special_tokens={"image_token": "<|end_of_text|>"},
    )
    tokenizer.chat_template = PLAIN.replace(
        "{{ eos_token }}", "{{ additional_special_tokens[0] + image_token }}"
    )
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    text, tokens = check_chat_template(tokenizer)
    spec = EncoderSpec(
        "chat_template", 1, 2, 4096, tokenizer_json=str(path), template=text, template_tokens=tokens
    )
    assert hash(spec)
    assert json.dumps(spec.as_key())
    (piece,) = encode(ChatTemplateEncoder(spec), TALK).pieces
    ids = split_signed(piece)[0].tolist()
    assert ids == apply(tokenizer, text, TALK)["input_ids"]
    assert ids[-2:] == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])


def test_a_tokenizer_that_takes_control_tokens_for_text(llama3_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir, split_special_tokens=True)
    tokenizer.chat_template = PLAIN
    with pytest.raises(UserError, match="apply_chat_template gives other ids"):
        check_chat_template(tokenizer)


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_answers_that_begin_with_a_space(
    llama3_tokenizer_dir: Path, tmp_path: Path, trim_offsets: bool
) -> None:
    """A tokenizer that trims offsets loses the mask of transformers there."""
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    value = json.loads(tokenizer.backend_tokenizer.to_str())
    value["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim_offsets,
        "use_regex": False,
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    template = MARKED.replace("'[assistant]\n'", "'[assistant]'")
    tokens = tuple(sorted((k, v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)))
    spec = EncoderSpec(
        "chat_template", 1, 2, 4096, tokenizer_json=str(path), template=template, template_tokens=tokens
    )
    messages = [
        Message("human", "a"),
        Message("assistant", " b c"),
        Message("human", "d"),
        Message("assistant", " e"),
    ]
    (piece,) = encode(ChatTemplateEncoder(spec), messages).pieces
    end = tokenizer.eos_token
    assert tokenizer.decode(piece[piece >= 0]) == f" b c{end} e{end}"


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
        make_encoder(HIDDEN)
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
    assert encode(make_encoder(STRICT), messages) == Outcome(
        0, reason="refused by the chat template", notes=["starts with the assistant"]
    )


def test_the_date_does_not_depend_on_the_day(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder("{{ strftime_now('%d %B %Y') }}{{ date_string }}" + PLAIN)
    assert encoder.parse(as_value(TALK)).full.text.startswith("26 July 202426 Jul 2024")


def test_conversations_that_can_not_be_rendered(make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(STRICT)
    for messages in (
        [Message("assistant", "Hi")],
        [Message("system", "a")],
        [Message("system", "a"), *TALK[1:4]],
    ):
        outcome = encode(encoder, messages)
        assert (outcome.num_tokens, outcome.reason) == (0, "refused by the chat template")
    with pytest.raises(BadRecord, match="noncharacter"):
        encoder.parse(as_value([Message("human", "\ufdd0")]))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(SNIPPETS), min_size=1), data=st.data())
def test_tokens_of_a_span_are_those_whose_offsets_meet_it(
    tokenizer: Any, parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    encoding = JinjaTemplate(tokenizer, PLAIN).backend.encode(text, add_special_tokens=False)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(text))] * 2)))
    ids = np.array(encoding.ids)
    wanted = [i for i, (first, last) in enumerate(encoding.offsets) if last > start and first < end]
    assert ids[find_tokens(encoding, start, end)].tolist() == ids[wanted].tolist()


def test_templates_that_take_what_they_wrote_are_told_from_others() -> None:
    for template in (PLAIN, HIDDEN, STRICT, "{% set x = 1 %}{% for m in messages %}{% break %}{% endfor %}"):
        assert only_writes(template)
    for template in (
        "{% set x %}a{% endset %}{{ x | upper }}",
        "{% filter upper %}a{% endfilter %}",
        "{% macro f() %}a{% endmacro %}{{ f() | upper }}",
        "{% for m in messages recursive %}{{ loop(m.c) | upper }}{% endfor %}",
        "{% block b %}a{% endblock %}{{ self.b() | upper }}",
        "{% set x %}",
        "{% generation %}a{% endgeneration %}",
        "{% raw %}{{ '\ufdd0' }}{% endraw %}",
        "{{ 'a\ufdd0b' | length }}",
    ):
        assert not only_writes(template), template


def test_answers_between_marks_that_are_changed_afterwards_are_refused(
    tokenizer: Any, make_encoder: MakeEncoder
) -> None:
    body = "{% generation %}{{ m['content'] }}{% endgeneration %}"
    loop = f"{{% for m in messages %}}{{% if m['role'] == 'assistant' %}}{body}{{% endif %}}{{% endfor %}}"
    messages = [Message("human", "a"), Message("assistant", "ab")]
    template = JinjaTemplate(tokenizer, f"{{% filter replace('b', 'c') %}}{loop}{{% endfilter %}}")
    assert not template.only_adds_marks
    assert template.render(messages).text == "ac"
    # To this filter, a mark is the first letter.
    template = JinjaTemplate(tokenizer, f"{{% filter capitalize %}}{loop}{{% endfilter %}}")
    with pytest.raises(BadRecord, match="changes what is between"):
        template.render(messages)
    assert JinjaTemplate(tokenizer, loop).only_adds_marks
    assert JinjaTemplate(tokenizer, loop).render(messages).spans == [(0, 2)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}"
        "{% generation %}{% if '>' in c %}{% set c = c.split('>')[-1] %}{% endif %}{{ c }}{% endgeneration %}"
        "{% else %}{{ c }}{% endif %}[{{ c }}]{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }} "
        "{%- endgeneration %} x {% else %} {{ m.content }} {% endif %}\n{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}({{ ns.n }})"
        "{% if loop.changed(m.role) %}!{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{% if 'b' in m.content %}{% raw %}{% generation %}{% endraw %}"
        "{% endif %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_marks_change_nothing_of_what_is_written(tokenizer: Any, template: str) -> None:
    found = JinjaTemplate(tokenizer, template)
    assert found.marked_template is not None
    for contents in (("a", "b", "c", "d"), ("a>b", "<x>y", " b ", "")):
        messages = [Message(role, c) for role, c in zip(("human", "assistant") * 2, contents, strict=True)]
        try:
            rendered = found.render(messages)
        except BadRecord:  # a tag as raw text is a mark too many
            assert "raw" in template
            continue
        assert rendered.text == found.apply(messages)
        said = [m.content for m in messages if m.role == "assistant" and m.content]
        assert [
            c.split(">")[-1] in rendered.text[a:b] for c, (a, b) in zip(said, rendered.spans, strict=True)
        ]
