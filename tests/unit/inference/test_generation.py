"""Answers are those of `transformers`, whole or streamed, and end where they should."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM

from colossal_llama.conversation.messages import Message
from colossal_llama.inference.generation import AnswerGenerator
from colossal_llama.inference.loading import LoadedModel
from colossal_llama.inference.prompt_encoding import choose_prompt_style
from colossal_llama.inference.settings import Sampling
from colossal_llama.inference.streaming import StreamDecoder
from colossal_llama.utils.errors import UserError

QUESTIONS = ["Where is the river?", "长江在哪里？", "</s><|eot_id|> " * 9]


def make_prompt(loaded: LoadedModel, text: str, style: str = "sft") -> list[int]:
    return choose_prompt_style(loaded.tokenizer, style, None, False).encode([Message("human", text)])


def generate(model: LlamaForCausalLM, prompt: list[int], **options: object) -> list[int]:
    """New tokens by `transformers` alone."""
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), pad_token_id=0, **options
    )
    return output[0, len(prompt) :].tolist()


def decode(loaded: LoadedModel, ids: list[int]) -> str:
    decoder = StreamDecoder(loaded.tokenizer)
    return "".join([*map(decoder.push, ids), decoder.finish()])


@contextmanager
def generation_config(model: LlamaForCausalLM, **values: object) -> Iterator[None]:
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    for name, value in values.items():
        setattr(model.generation_config, name, value)
    yield
    model.generation_config = before


@pytest.mark.parametrize("style", ["sft", "pretrained"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_is_that_of_transformers(
    loaded: LoadedModel, reference: LlamaForCausalLM, style: str, question: str
) -> None:
    prompt = make_prompt(loaded, question, style)
    expected = generate(reference, prompt, do_sample=False, max_new_tokens=60)
    assert len(set(expected)) > 3
    streamed: list[str] = []
    answer = AnswerGenerator(loaded, frozenset(), 60, None).answer(prompt, streamed.append)
    assert answer.ids == expected
    assert "".join(streamed) == answer.text == decode(loaded, expected)


def test_greedy_in_bf16(loaded: LoadedModel, reference: LlamaForCausalLM) -> None:
    half = replace(loaded, model=copy.deepcopy(loaded.model).bfloat16())
    prompt = make_prompt(loaded, QUESTIONS[0])
    expected = generate(copy.deepcopy(reference).bfloat16(), prompt, do_sample=False, max_new_tokens=40)
    assert AnswerGenerator(half, frozenset(), 40, None).answer(prompt, print).ids == expected


def test_sampling_is_that_of_transformers(loaded: LoadedModel, reference: LlamaForCausalLM) -> None:
    prompt = make_prompt(loaded, QUESTIONS[0])
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.8}
    transformers.set_seed(7)
    expected = generate(reference, prompt, do_sample=True, max_new_tokens=40, **options)
    transformers.set_seed(7)
    answer = AnswerGenerator(loaded, frozenset(), 40, Sampling(**options)).answer(prompt, print)
    assert answer.ids == expected


def test_the_models_own_generation_settings_hold(loaded: LoadedModel, reference: LlamaForCausalLM) -> None:
    prompt = make_prompt(loaded, QUESTIONS[0])
    plain = generate(reference, prompt, do_sample=False, max_new_tokens=40)
    with (
        generation_config(reference, repetition_penalty=5.0),
        generation_config(loaded.model, repetition_penalty=5.0),
    ):
        expected = generate(reference, prompt, do_sample=False, max_new_tokens=40)
        answer = AnswerGenerator(loaded, frozenset(), 40, None).answer(prompt, print)
    assert answer.ids == expected != plain


def test_modes_and_sampling_settings_of_the_model_do_not_interfere(
    loaded: LoadedModel, reference: LlamaForCausalLM, recwarn: pytest.WarningsRecorder
) -> None:
    prompt = make_prompt(loaded, QUESTIONS[0])
    expected = generate(reference, prompt, do_sample=False, max_new_tokens=20)
    with generation_config(
        loaded.model,
        num_beams=4,
        temperature=0.6,
        top_p=0.9,
        max_length=30,
        do_sample=True,
        use_cache=False,
        cache_implementation="static",
        early_stopping=True,
        length_penalty=0.5,
        force_words_ids=[[5]],
        token_healing=True,
    ):
        generator = AnswerGenerator(loaded, frozenset(), 20, None, keep_cache=True)
        assert generator.answer(prompt, print).ids == expected
    assert not recwarn.list


@pytest.mark.parametrize("where", ["style", "one in the model's configuration", "several"])
def test_stops_at_end_tokens(loaded: LoadedModel, reference: LlamaForCausalLM, where: str) -> None:
    prompt = make_prompt(loaded, QUESTIONS[0])
    ids = generate(reference, prompt, do_sample=False, max_new_tokens=30)
    end_id = next(token_id for i, token_id in enumerate(ids) if i > 5 and token_id not in ids[:i])
    own = {"style": None, "several": [0, end_id]}.get(where, end_id)
    with generation_config(loaded.model, eos_token_id=own):
        generator = AnswerGenerator(loaded, frozenset({end_id} if where == "style" else {}), 30, None)
        answer = generator.answer(prompt, print)
    assert answer.ids == ids[: ids.index(end_id) + 1]
    assert answer.stopped_by == "end"
    # The end token is no part of the text, even if it is an ordinary one.
    assert answer.text == decode(loaded, answer.ids[:-1])


def test_stops_at_the_models_own_stop_strings(loaded: LoadedModel, reference: LlamaForCausalLM) -> None:
    prompt = make_prompt(loaded, QUESTIONS[0])
    whole = AnswerGenerator(loaded, frozenset(), 30, None).answer(prompt, print)
    word = loaded.tokenizer.decode(whole.ids[8:10]).strip()
    with generation_config(loaded.model, stop_strings=[word]):
        answer = AnswerGenerator(loaded, frozenset(), 30, None).answer(prompt, print)
    assert answer.ids == whole.ids[: len(answer.ids)]
    assert len(answer.ids) < 30
    assert answer.stopped_by == "end"


def test_stops_at_the_limit_and_at_the_end_of_the_context(loaded: LoadedModel) -> None:
    small = replace(loaded, context_length=100)
    prompt = make_prompt(loaded, QUESTIONS[0])[:90]
    by_limit = AnswerGenerator(small, frozenset(), 4, None).answer(prompt, print)
    assert (len(by_limit.ids), by_limit.stopped_by) == (4, "max_new_tokens")
    by_context = AnswerGenerator(small, frozenset(), 50, None).answer(prompt, print)
    assert (len(by_context.ids), by_context.stopped_by) == (10, "context_length")


def test_prompt_that_does_not_fit(loaded: LoadedModel) -> None:
    generator = AnswerGenerator(loaded, frozenset(), 4, None)
    with pytest.raises(UserError, match="has 512 tokens, template included, and the model's context is 512"):
        generator.answer([5] * 512, print)
    assert len(generator.answer([5] * 511, print).ids) == 1


def test_tokenizer_of_another_model(loaded: LoadedModel) -> None:
    generator = AnswerGenerator(loaded, frozenset(), 4, None)
    with pytest.raises(UserError, match="use the tokenizer that belongs to the model"):
        generator.answer([1, 100_000], print)


def test_no_end_token_at_all(loaded: LoadedModel) -> None:
    with generation_config(loaded.model, eos_token_id=None):
        generator = AnswerGenerator(loaded, frozenset(), 5, None)
        assert len(generator.answer([5, 6], print).ids) == 5
