"""Notes for people on standard error, and reading what they type: standard output is for answers alone."""

from __future__ import annotations

import contextlib
import logging
import os
import sys


def note(message: str) -> None:
    print(f"[{message}]", file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Prints a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_streams() -> None:
    """Characters that a stream can't hold are replaced; a standard input that was closed is an empty one."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (open as long as the program runs)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def quiet_libraries() -> None:
    """Silences what a healthy run would print; everything else that libraries say is still heard."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # Said of every LLaMA-2 tokenizer whose configuration does not mention `legacy`: the model was trained
    # with what is then the default, so that is the right one.
    for name in ("tokenization_llama", "tokenization_llama_fast"):
        _drop_messages(f"transformers.models.llama.{name}", "You are using the default legacy behaviour")
    # The prompt's length is checked against the model's own limit, with a message that names it.
    _drop_messages("transformers.tokenization_utils_base", "Token indices sequence length is longer")


def _drop_messages(logger: str, beginning: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(beginning))


def read_message(prompt: str) -> str | None:
    """The next line of standard input, None at its end. `prompt` is shown if a person types."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and line editing)
    if not sys.stdout.isatty():
        # `input` would write the prompt among the answers.
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None
