"""Answers prompts with a LLaMA model, or holds a conversation."""

from __future__ import annotations

from colossal_llama.inference.arguments import parse_settings
from colossal_llama.upstream.lean_imports import lean_imports
from colossal_llama.utils.errors import run_command


def main() -> int:
    settings = parse_settings()
    from colossal_llama.inference.prompt_input import read_prompts
    from colossal_llama.inference.terminal import prepare_streams, until_reader_leaves
    from colossal_llama.upstream.quiet import quieten_libraries

    with until_reader_leaves():
        prepare_streams()
        # Before the model is loaded: a mistake in the file should not take minutes to show.
        prompts = [] if settings.prompts.chat else read_prompts(settings.prompts)
        quieten_libraries()
        with lean_imports():
            from colossal_llama.inference.answering import load_and_answer
        load_and_answer(settings, prompts)
    return 0


if __name__ == "__main__":
    run_command(main)
