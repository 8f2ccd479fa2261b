"""Answers prompts with a LLaMA model, or holds a conversation."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from colossal_llama.inference.arguments import build_parser
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.lean_imports import lean_imports

if TYPE_CHECKING:
    from colossal_llama.inference.generation import AnswerGenerator
    from colossal_llama.inference.prompt_encoding import PromptStyle


def run(args: Namespace) -> None:
    from colossal_llama.inference.prompt_input import holds_jsonl, read_prompts
    from colossal_llama.inference.terminal import note, prepare_streams
    from colossal_llama.utils.quiet import quieten_libraries

    prepare_streams()
    # Before the model is loaded: a mistake in the file should not take minutes to show.
    prompts = [] if args.chat else read_prompts(args)
    quieten_libraries()

    with lean_imports():
        import transformers
        from transformers.utils import logging as transformers_logging

        from colossal_llama.inference.chat import Conversation, chat
        from colossal_llama.inference.generation import AnswerGenerator, Sampling
        from colossal_llama.inference.loading import load_model
    from colossal_llama.inference.prompt_encoding import choose_prompt_style

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    loaded = load_model(args.model_path, args.tokenizer_path, args.device, args.dtype, args.trust_remote_code)
    note(f"{args.model_path}: {loaded.describe()}")
    style = choose_prompt_style(loaded.tokenizer, args.prompt_style, args.llama_version, args.chat_template)
    sampling = Sampling(args.temperature, args.top_k, args.top_p) if args.do_sample else None
    generator = AnswerGenerator(loaded, style.end_ids, args.max_new_tokens, sampling, keep_cache=args.chat)
    transformers.set_seed(args.seed)
    try:
        if args.chat:
            chat(Conversation(generator, style.encode))
        else:
            answer_prompts(prompts, style, generator, as_jsonl=holds_jsonl(args))
    finally:
        if generator.totals.answers:
            print(generator.totals.table(), file=sys.stderr)


def answer_prompts(
    prompts: list[str], style: PromptStyle, generator: AnswerGenerator, as_jsonl: bool
) -> None:
    """Answers each prompt by itself: streamed text with an empty line between two, or a JSON object a line.

    Raises:
        UserError: some prompts could not be answered; the others were.
    """
    from colossal_llama.dataset.conversation import Message
    from colossal_llama.inference.chat import explain_stop
    from colossal_llama.inference.generation import STOPPED_BY_USER
    from colossal_llama.inference.terminal import write_answer

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
            record = {
                "prompt": prompt,
                "answer": answer.text,
                "num_tokens": len(answer.ids),
                "stopped_by": answer.stopped_by,
            }
            write_answer(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            write_answer("\n" if number == len(prompts) else "\n\n")
            explain_stop(answer, generator)
    if problems:
        raise UserError(problems)


def main() -> int:
    args = build_parser().parse_args()
    try:
        run(args)
    except BrokenPipeError:
        # The reader (`head`, say) has what it wants. Python would complain again when it closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    run_command(main)
