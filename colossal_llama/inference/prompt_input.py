"""The prompts of a run, from the command line, a file or standard input."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable

from colossal_llama.dataset.jsonl import UTF8_BOM, BadRecord, parse_object, take_string
from colossal_llama.inference.arguments import STANDARD_INPUT
from colossal_llama.utils.errors import UserError

MAX_PROBLEMS = 20


def read_prompts(args: Namespace) -> list[str]:
    """Every prompt that `--input_txt` or `--input_file` names, in order.

    Raises:
        UserError: lines that can't be used, each by name and number, or no prompt at all.
    """
    if args.input_txt is not None:
        return args.input_txt
    if args.input_file == STANDARD_INPUT:
        return parse_prompts("standard input", sys.stdin.buffer, holds_jsonl(args))
    with open(args.input_file, "rb") as file:
        return parse_prompts(args.input_file, file, holds_jsonl(args))


def holds_jsonl(args: Namespace) -> bool:
    """Whether `--input_file` is JSONL: said by `--input_format`, or by the file's name."""
    if args.input_format != "auto":
        return args.input_format == "jsonl"
    return args.input_file is not None and args.input_file.endswith(".jsonl")


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
