"""The prompts of a run, from the command line, a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from colossal_llama.corpus.jsonl import UTF8_BOM
from colossal_llama.corpus.records import BadRecord, parse_object, take_string
from colossal_llama.inference.settings import STANDARD_INPUT, PromptSettings
from colossal_llama.utils.errors import UserError

MAX_PROBLEMS = 20


def read_prompts(settings: PromptSettings) -> list[str]:
    """Every prompt that `--input_txt` or `--input_file` names, in order.

    Raises:
        UserError: lines that can't be used, each by name and number, or no prompt at all.
    """
    if settings.input_txt is not None:
        return settings.input_txt
    if settings.input_file == STANDARD_INPUT:
        return parse_prompts("standard input", sys.stdin.buffer, settings.holds_jsonl)
    with open(settings.input_file, "rb") as file:
        return parse_prompts(settings.input_file, file, settings.holds_jsonl)


def parse_prompts(name: str, lines: Iterable[bytes], jsonl: bool) -> list[str]:
    """One prompt of each line that is not empty; `name` stands in messages."""
    prompts, problems = [], []
    for number, line in enumerate(lines, start=1):
        line = line.removeprefix(UTF8_BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            prompts.append(_parse_json_prompt(line) if jsonl else line.decode("utf-8").rstrip("\r\n"))
        except BadRecord as error:
            problems.append(f"{name}:{number}: {error}")
        except UnicodeDecodeError as error:
            problems.append(f"{name}:{number}: not UTF-8 text (byte {error.start})")
    if len(problems) > MAX_PROBLEMS:
        rest = len(problems) - MAX_PROBLEMS
        problems[MAX_PROBLEMS:] = [f"{name}: {rest:,} more lines can't be used"]
    if not prompts and not problems:
        problems.append(f"{name}: holds no prompt")
    if problems:
        raise UserError(problems)
    return prompts


def _parse_json_prompt(line: bytes) -> str:
    prompt = take_string(parse_object(line), "prompt")
    if not prompt.strip():
        raise BadRecord("'prompt' empty", "'prompt' is empty")
    return prompt
