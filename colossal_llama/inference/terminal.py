"""Notes for people on standard error, and reading what they type: standard output is for answers alone."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings


def note(message: str) -> None:
    print(f"[{message}]", file=sys.stderr, flush=True)


def write_answer(text: str) -> None:
    """Prints a piece of an answer at once; characters that the terminal lacks are replaced, not an error."""
    sys.stdout.write(text)
    sys.stdout.flush()


def prepare_streams() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def quiet_libraries() -> None:
    """Silences what a healthy run would print; everything else that libraries say is still heard."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    # Said of every LLaMA-2 tokenizer that keeps the source's `legacy` setting, which is what we want of it.
    logging.getLogger("transformers.tokenization_utils_base").addFilter(
        lambda record: "You are using the default legacy behaviour" not in record.getMessage()
    )
    # The prompt's length is checked against the model's own limit, with a message that names it.
    logging.getLogger("transformers.tokenization_utils_base").addFilter(
        lambda record: "Token indices sequence length is longer" not in record.getMessage()
    )
    # Some environments have CUDA builds of libraries on machines without a GPU.
    warnings.filterwarnings("ignore", message="CUDA initialization:", category=UserWarning)


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
