"""Command line and prompt files: mistakes are found before anything heavy is imported, all at once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from colossal_llama.inference.arguments import build_parser, prompt_text
from colossal_llama.inference.prompt_input import holds_jsonl, parse_prompts, read_prompts
from colossal_llama.utils.errors import UserError


def problems_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        build_parser().parse_args([str(argument) for argument in arguments])
    assert exit_info.value.code == 2
    return capsys.readouterr().err


def test_defaults() -> None:
    args = build_parser().parse_args(["--model_path", "owner/name", "--input_txt", "x"])
    assert vars(args) == {
        "model_path": "owner/name",
        "tokenizer_path": None,
        "device": "auto",
        "dtype": "auto",
        "trust_remote_code": False,
        "input_txt": ["x"],
        "input_file": None,
        "input_format": "auto",
        "chat": False,
        "prompt_style": "sft",
        "llama_version": None,
        "chat_template": False,
        "max_new_tokens": 512,
        "do_sample": True,
        "temperature": 0.3,
        "top_k": 50,
        "top_p": 0.95,
        "seed": 42,
    }


def test_the_command_of_the_readme() -> None:
    text = (
        "--model_path some/model --device cuda:0 --max_new_tokens 512 --do_sample False --temperature 0.3 "
        "--top_k 50 --top_p 0.95 --input_txt"
    )
    args = build_parser().parse_args([*text.split(), "YOUR_PROMPT_OR_QUESTION"])
    assert (args.do_sample, args.device) == (False, "cuda:0")


def test_all_problems_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "checkpoint" / "modeling").mkdir(parents=True)
    (tmp_path / "checkpoint" / "modeling" / "config.json").write_text("{}", encoding="utf-8")
    errors = problems_of(
        capsys,
        *("--model_path", tmp_path / "checkpoint"),
        *("--tokenizer_path", tmp_path / "empty"),
        *("--input_file", tmp_path / "no.txt"),
        *("--device", "gpu"),
        *("--temperature", "-1"),
        *("--top_p", "0"),
        *("--top_k", "x"),
        *("--max_new_tokens", "0"),
        *("--do_sample", "perhaps"),
        "--bad_flag",
    )
    for expected in (
        f"has no config.json (nor adapter_config.json); use {tmp_path / 'checkpoint' / 'modeling'}",
        "--tokenizer_path",
        "no.txt: no such file",
        "--device gpu: choose from auto, cpu, cuda, cuda:N",
        "--temperature -1: must be at least 0",
        "--top_p 0: must be above 0",
        "--top_k x: is not a whole number",
        "--max_new_tokens 0: must be at least 1",
        "--do_sample perhaps: use True or False",
        "unknown arguments: --bad_flag",
    ):
        assert expected in errors


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/nowhere/model", "a/b/c", "model dir", ""])
def test_names_that_are_neither_directories_nor_of_the_hub(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    errors = problems_of(capsys, "--model_path", name, "--chat")
    assert "error: --model_path" in errors


def test_local_path_with_a_typing_error_is_not_looked_for_on_the_hub(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "no such directory" in problems_of(capsys, "--model_path", "models/lama", "--chat")
    assert "is not a directory" in problems_of(capsys, "--model_path", "file", "--chat")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to answer"),
        (["--chat", "--input_txt", "x"], "--input_txt and --chat do not go together"),
        (["--chat", "--prompt_style", "pretrained"], "--chat: --prompt_style pretrained knows no turns"),
        (["--chat", "--chat_template", "--llama_version", "3"], "--llama_version 3: has no effect with"),
        (["--input_txt", "x", "--temperature", "0"], "use --do_sample False"),
        (["--input_txt", "x", "--temperature", "1e-40"], "--temperature 1e-40: sampling needs 1e-06 or more"),
        (["--input_txt", "x", "--input_format", "jsonl"], "has no effect without --input_file"),
        (["--input_txt", " "], "the prompt is empty"),
    ],
)
def test_clashes(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert expected in problems_of(capsys, "--model_path", "a/b", *arguments)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        prompt_text("\udce9")


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
    args = build_parser().parse_args(
        ["--model_path", "a/b", "--input_file", str(path), "--input_format", declared]
    )
    assert holds_jsonl(args) is expected
    assert read_prompts(args) == (["x"] if expected else ['{"prompt": "x"}'])
