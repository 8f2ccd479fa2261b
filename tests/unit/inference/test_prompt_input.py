"""Prompts of a file: text by line, or JSONL; lines that can't be used are all named."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from colossal_llama.inference.prompt_input import parse_prompts, read_prompts
from colossal_llama.inference.settings import PromptSettings
from colossal_llama.utils.errors import UserError


def test_prompts_of_a_text_file() -> None:
    lines = io.BytesIO('\ufeffWhere is 长江?\r\n\n  {"prompt": 1}  \nlast'.encode())
    assert parse_prompts("x", lines, jsonl=False) == ["Where is 长江?", '  {"prompt": 1}  ', "last"]


def test_prompts_of_jsonl() -> None:
    lines = io.BytesIO('{"prompt": "one\\ntwo", "id": 3}\n\n{"prompt": "长江"}\n'.encode())
    assert parse_prompts("x", lines, jsonl=True) == ["one\ntwo", "长江"]


def test_bad_lines_are_all_named() -> None:
    lines = io.BytesIO(b'{"prompt": 1}\n{"prompt": "x"}\n\nnot json\n{"prompt": ""}\n{"text": "x"}\n\xff\n')
    with pytest.raises(UserError) as error:
        parse_prompts("p.jsonl", lines, jsonl=True)
    starts = [problem.split(": ")[0] for problem in error.value.problems]
    assert starts == [f"p.jsonl:{number}" for number in (1, 4, 5, 6, 7)]


def test_many_bad_lines_are_counted() -> None:
    with pytest.raises(UserError) as error:
        parse_prompts("p", io.BytesIO(b"\xff\n" * 1030), jsonl=False)
    assert error.value.problems[-1] == "p: 1,010 more lines can't be used"


def test_no_prompt() -> None:
    with pytest.raises(UserError, match="p: holds no prompt"):
        parse_prompts("p", io.BytesIO(b"\n \n"), jsonl=False)


@pytest.mark.parametrize(
    ("name", "declared", "expected"),
    [
        ("a.jsonl", "auto", True),
        ("a.txt", "auto", False),
        ("a.txt", "jsonl", True),
        ("a.jsonl", "text", False),
    ],
)
def test_format(tmp_path: Path, name: str, declared: str, expected: bool) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "x"}\n', encoding="utf-8")
    settings = PromptSettings(input_file=str(path), input_format=declared)
    assert settings.holds_jsonl is expected
    assert read_prompts(settings) == (["x"] if expected else ['{"prompt": "x"}'])
