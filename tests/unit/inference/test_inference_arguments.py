"""Command line: mistakes are found before anything heavy is imported, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.inference.arguments import build_parser, parse_settings
from colossal_llama.inference.settings import Sampling, prompt_text


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
        "template": None,
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
    settings = parse_settings([*text.split(), "YOUR_PROMPT_OR_QUESTION"])
    assert (settings.answer.do_sample, settings.model.device) == (False, "cuda:0")
    assert settings.prompts.input_txt == ["YOUR_PROMPT_OR_QUESTION"]


def test_the_next_token_is_drawn_or_the_most_likely_one() -> None:
    words = ["--model_path", "a/b", "--chat", "--temperature", "0.5", "--top_k", "0", "--top_p", "1"]
    assert parse_settings(words).answer.sampling == Sampling(0.5, 0, 1.0)
    assert parse_settings([*words, "--no-do_sample"]).answer.sampling is None


def test_a_prompt_can_be_given_several_times() -> None:
    words = ["--model_path", "a/b", "--input_txt", "one", "--input_txt", "two"]
    assert parse_settings(words).prompts.input_txt == ["one", "two"]


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
