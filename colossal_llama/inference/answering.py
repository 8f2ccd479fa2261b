"""A loaded model at work: it holds a conversation, or answers a list of prompts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import transformers
from transformers.utils import logging as transformers_logging

from colossal_llama.conversation.messages import Message
from colossal_llama.inference.chat import Conversation, chat, explain_stop
from colossal_llama.inference.generation import STOPPED_BY_USER, Answer, AnswerGenerator
from colossal_llama.inference.loading import load_model
from colossal_llama.inference.prompt_encoding import PromptStyle, choose_prompt_style
from colossal_llama.inference.settings import InferenceSettings
from colossal_llama.inference.terminal import note, write_answer
from colossal_llama.utils.errors import UserError


def load_and_answer(settings: InferenceSettings, prompts: Sequence[str]) -> None:
    """Loads the model, answers, and says what that took.

    Args:
        prompts: ignored where the settings ask for a conversation.

    Raises:
        UserError: something can't be loaded, or some prompts could not be answered.
    """
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    asked, limits = settings.prompts, settings.answer
    loaded = load_model(settings.model)
    note(f"{settings.model.model_path}: {loaded.describe()}")
    style = choose_prompt_style(
        loaded.tokenizer, asked.prompt_style, asked.llama_version, asked.chat_template, asked.template
    )
    generator = AnswerGenerator(
        loaded, style.end_ids, limits.max_new_tokens, limits.sampling, keep_cache=asked.chat
    )
    transformers.set_seed(limits.seed)
    try:
        if asked.chat:
            chat(Conversation(generator, style.encode))
        else:
            answer_prompts(prompts, style, generator, as_jsonl=asked.holds_jsonl)
    finally:
        if generator.totals.answers:
            print(generator.totals.table(), file=sys.stderr)


def answer_prompts(
    prompts: Sequence[str], style: PromptStyle, generator: AnswerGenerator, as_jsonl: bool
) -> None:
    """Answers each prompt by itself: streamed text with an empty line between two, or one JSON object per
    line.

    Raises:
        UserError: some prompts could not be answered; the others were.
    """
    problems = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids = style.encode([Message("human", prompt)])
            answer = generator.answer(ids, on_text=(lambda _: None) if as_jsonl else write_answer)
        except UserError as error:
            problems.append(f"prompt {number}: {error}" if len(prompts) > 1 else str(error))
            continue
        if answer.stopped_by == STOPPED_BY_USER:
            write_answer("\n" if answer.text and not as_jsonl else "")
            raise KeyboardInterrupt
        if as_jsonl:
            write_answer(_as_json_line(prompt, answer))
        else:
            write_answer("\n" if number == len(prompts) else "\n\n")
            explain_stop(answer, generator)
    if problems:
        raise UserError(problems)


def _as_json_line(prompt: str, answer: Answer) -> str:
    record = {
        "prompt": prompt,
        "answer": answer.text,
        "num_tokens": len(answer.ids),
        "stopped_by": answer.stopped_by,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"
