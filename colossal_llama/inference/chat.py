"""A conversation: every message is answered in the light of those before it."""

from __future__ import annotations

from collections.abc import Callable

from colossal_llama.conversation.messages import Message
from colossal_llama.inference.generation import (
    STOPPED_BY_CONTEXT,
    STOPPED_BY_LIMIT,
    STOPPED_BY_USER,
    Answer,
    AnswerGenerator,
)
from colossal_llama.inference.prompt_encoding import PromptEncoder
from colossal_llama.inference.terminal import note, read_message, write_answer
from colossal_llama.utils.errors import UserError

CLEAR, EXIT = "clear", "exit"


class Conversation:
    """Messages so far, and the model's cache of them.

    When the context is full the oldest question and its answer are left out, as often as needed. Full means
    that less room is left than an answer may need: `max_new_tokens`, but at most half of the context.

    Args:
        generator: one that keeps its cache.
    """

    def __init__(self, generator: AnswerGenerator, encode: PromptEncoder) -> None:
        self.generator = generator
        self.encode = encode
        self.messages: list[Message] = []

    def ask(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Answers a message. An interrupted answer is kept as far as it came; a message that fails is not.

        Raises:
            UserError: the message alone does not fit the context.
        """
        before = self.messages
        self.messages = [*before, Message("human", text)]
        try:
            answer = self.generator.answer(self._make_prompt(), on_text)
        except BaseException:
            self.messages = before
            self.generator.forget()  # a second Ctrl-C may have come while the cache was put in order
            raise
        if answer.text or answer.stopped_by != STOPPED_BY_USER:
            self.messages.append(Message("assistant", answer.text))
        else:
            self.messages = before
        return answer

    def clear(self) -> None:
        self.messages = []
        self.generator.forget()

    def _make_prompt(self) -> list[int]:
        context_length = self.generator.context_length
        reserve = min(self.generator.max_new_tokens, context_length // 2)
        prompt = self.encode(self.messages)
        num_left_out = 0
        while len(prompt) + reserve > context_length and len(self.messages) > 1:
            self.messages = self.messages[2:]
            num_left_out += 1
            prompt = self.encode(self.messages)
        if num_left_out and len(prompt) < context_length:  # else the message alone is too long
            turns = "turn is" if num_left_out == 1 else f"{num_left_out} turns are"
            note(f"the context of {context_length:,} tokens is full: the oldest {turns} left out")
        return prompt


def chat(conversation: Conversation) -> None:
    """Answers a line at a time until `exit` or the end of standard input."""
    note(f"a message a line; {CLEAR} forgets the conversation, {EXIT} ends, Ctrl-C stops an answer")
    while True:
        try:
            text = read_message("Human: ")
        except KeyboardInterrupt:
            note(f"to leave, type {EXIT}")
            continue
        if text is None or text.strip() == EXIT:
            return
        if text.strip() == CLEAR:
            conversation.clear()
            note("the conversation is forgotten")
        elif text.strip():
            _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        answer = conversation.ask(text, write_answer)
    except UserError as error:
        note(f"not answered: {error}")
        return
    except KeyboardInterrupt:  # outside of the generation itself: while the prompt is encoded, say
        note("stopped")
        return
    write_answer("\n")
    explain_stop(answer, conversation.generator)


def explain_stop(answer: Answer, generator: AnswerGenerator) -> None:
    """Says why an answer ended where the model did not end it."""
    reasons = {
        STOPPED_BY_LIMIT: f"stopped at --max_new_tokens {generator.max_new_tokens}",
        STOPPED_BY_CONTEXT: f"stopped at the end of the context of {generator.context_length:,} tokens",
        STOPPED_BY_USER: "stopped",
    }
    if answer.stopped_by in reasons:
        note(reasons[answer.stopped_by])
