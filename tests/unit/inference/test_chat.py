"""Conversations: the kept cache changes nothing, the context never overflows, Ctrl-C stops an answer."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import pytest

from colossal_llama.conversation.messages import Message
from colossal_llama.inference.chat import Conversation, chat
from colossal_llama.inference.generation import AnswerGenerator
from colossal_llama.inference.loading import LoadedModel
from colossal_llama.inference.prompt_encoding import choose_prompt_style
from colossal_llama.utils.errors import UserError

QUESTIONS = ["Where is the river?", "And the sea, 长江?", "Why?", "What is </s>?"]


def make_conversation(loaded: LoadedModel, keep_cache: bool = True, max_new_tokens: int = 24) -> Conversation:
    style = choose_prompt_style(loaded.tokenizer, "sft", None, use_chat_template=False)
    generator = AnswerGenerator(loaded, style.end_ids, max_new_tokens, None, keep_cache=keep_cache)
    return Conversation(generator, style.encode)


def ask(conversation: Conversation, text: str) -> str:
    return conversation.ask(text, lambda _: None).text


def interrupt_after(num_pieces: int) -> Callable[[str], None]:
    """Ctrl-C while an answer is written."""
    seen = []

    def on_text(text: str) -> None:
        seen.append(text)
        if len(seen) == num_pieces:
            raise KeyboardInterrupt

    return on_text


def test_answers_are_those_without_a_cache(loaded: LoadedModel) -> None:
    cached, plain = make_conversation(loaded), make_conversation(loaded, keep_cache=False)
    for number, question in enumerate(QUESTIONS):
        answer = cached.ask(question, lambda _: None)
        expected = plain.ask(question, lambda _: None)
        assert answer.ids == expected.ids
        assert expected.num_reused == 0
        # The conversation so far is not computed again: at least up to the last answer.
        asked_before = len(cached.encode(cached.messages[: 2 * number - 1])) if number else 0
        assert answer.num_reused >= asked_before
    assert cached.messages == plain.messages


def test_answers_depend_on_the_conversation(loaded: LoadedModel) -> None:
    """Otherwise the comparisons here would prove nothing."""
    conversation = make_conversation(loaded)
    answers = [ask(conversation, "Why?") for _ in range(2)]
    conversation.clear()
    assert answers[0] != answers[1]
    assert ask(conversation, "Why?") == answers[0]


def test_a_cache_of_other_text_is_not_used(loaded: LoadedModel) -> None:
    conversation, fresh = make_conversation(loaded), make_conversation(loaded)
    ask(conversation, "Something else, and quite long at that.")
    conversation.messages = []
    answer = conversation.ask("Why?", lambda _: None)
    assert 0 < answer.num_reused < len(conversation.encode([Message("human", "Why?")]))
    assert answer.text == ask(fresh, "Why?")


@pytest.mark.parametrize("num_pieces", [1, 2, 7])
def test_interrupted_answers_are_kept_as_far_as_they_came(loaded: LoadedModel, num_pieces: int) -> None:
    conversation = make_conversation(loaded)
    ask(conversation, QUESTIONS[0])
    answer = conversation.ask(QUESTIONS[1], interrupt_after(num_pieces))
    assert answer.stopped_by == "interrupt"
    assert conversation.messages[-1] == Message("assistant", answer.text)
    fresh = make_conversation(loaded, keep_cache=False)
    fresh.messages = list(conversation.messages)
    assert ask(conversation, QUESTIONS[2]) == ask(fresh, QUESTIONS[2])


@pytest.mark.parametrize("module", ["layer 0", "layer 1", "head"])
@pytest.mark.parametrize("num_calls", [1, 4])
def test_interrupted_anywhere_in_the_model(loaded: LoadedModel, module: str, num_calls: int) -> None:
    """Ctrl-C between two layers leaves a cache that some layers have written to and others have not."""
    model = loaded.model
    target = {"layer 0": model.model.layers[0].mlp, "layer 1": model.model.layers[1].mlp}.get(
        module, model.lm_head
    )
    conversation = make_conversation(loaded)
    ask(conversation, QUESTIONS[0])
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == num_calls:
            raise KeyboardInterrupt

    hook = target.register_forward_pre_hook(interrupt)
    answer = conversation.ask(QUESTIONS[1], lambda _: None)
    hook.remove()
    assert len(answer.ids) == num_calls - 1
    if num_calls == 1:
        assert len(conversation.messages) == 2  # nothing came: the question is forgotten too
    fresh = make_conversation(loaded, keep_cache=False)
    fresh.messages = list(conversation.messages)
    assert ask(conversation, QUESTIONS[2]) == ask(fresh, QUESTIONS[2])


def test_full_context_leaves_out_the_oldest_turns(
    loaded: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    small = replace(loaded, context_length=260)
    conversation, plain = make_conversation(small), make_conversation(small, keep_cache=False)
    for number in range(8):
        question = f"Question {number}: " + QUESTIONS[number % 4]
        answer = conversation.ask(question, lambda _: None)
        assert answer.text == ask(plain, question)
        assert answer.stopped_by != "context_length"
        assert conversation.messages[-2] == Message("human", question)
        assert len(conversation.encode(conversation.messages[:-1])) + 24 <= 260
    assert 2 < len(conversation.messages) < 16
    assert "the context of 260 tokens is full: the oldest turn is left out" in capsys.readouterr().err


def test_answers_longer_than_the_context(loaded: LoadedModel) -> None:
    small = replace(loaded, context_length=260)
    conversation = make_conversation(small, max_new_tokens=100_000)
    for question in QUESTIONS:
        assert conversation.ask(question, lambda _: None).ids


def test_message_that_alone_is_too_long(loaded: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    conversation, fresh = make_conversation(loaded), make_conversation(loaded)
    for talk in (conversation, fresh):
        ask(talk, QUESTIONS[0])
    with pytest.raises(UserError, match="shorten it"):
        conversation.ask("long " * 600, lambda _: None)
    assert "left out" not in capsys.readouterr().err
    assert conversation.messages == fresh.messages
    assert ask(conversation, QUESTIONS[1]) == ask(fresh, QUESTIONS[1])


def test_commands(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["Why?", "", "Why?", " clear ", "Why?", "word " * 600, "exit", "Why?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    conversation = make_conversation(loaded)
    expected = [ask(conversation, "Why?") for _ in range(2)]
    conversation.clear()
    chat(conversation)
    output = capsys.readouterr()
    assert output.out == "".join(text + "\n" for text in [*expected, expected[0]])
    assert "not answered: the prompt has" in output.err


def test_ctrl_c_at_the_prompt(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt(), None])

    def read(_: str) -> None:
        value = next(typed)
        if value is not None:
            raise value

    monkeypatch.setattr("colossal_llama.inference.chat.read_message", read)
    chat(make_conversation(loaded))
    assert "to leave, type exit" in capsys.readouterr().err
