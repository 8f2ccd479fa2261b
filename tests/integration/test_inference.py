"""`inference_example.py` as a user runs it: what is on which stream, pipes, Ctrl-C, exit codes."""

from __future__ import annotations

import json
import os
import pty
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from colossal_llama.conversation.colossal import ColossalTemplate
from colossal_llama.conversation.messages import Message
from colossal_llama.inference.streaming import StreamDecoder

SCRIPT = "inference_example.py"
QUESTIONS = ["Where is the river?", "长江在哪里？"]


def command(root: Path, *arguments: object) -> list[str]:
    return [sys.executable, str(root / SCRIPT), *map(str, arguments)]


def run(root: Path, *arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *arguments),
        capture_output=True,
        text=True,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        timeout=100,
    )


def greedy(directory: Path, question: str, max_new_tokens: int) -> str:
    """The answer by `transformers` alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    template = ColossalTemplate.of_tokenizer(tokenizer, 2)
    prompt = torch.tensor([template.encode_prompt([Message("human", question)])])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=2,
    )
    # Not `tokenizer.decode`: among the stray bytes of a random model it also hides the good ones.
    decoder = StreamDecoder(tokenizer)
    return "".join([*map(decoder.push, ids[0, prompt.shape[1] :].tolist()), decoder.finish()])


def check_totals(lines: list[str], answers: int, tokens_answered: int) -> None:
    """The table that ends standard error, and nothing else."""
    found = {line[:25].strip(): line[25:].strip() for line in lines}
    assert list(found) == [
        *("inference", "-" * 24, "answers", "prompt tokens read"),
        *("tokens answered", "seconds", "tokens answered a second"),
    ]
    assert (found["answers"], found["tokens answered"]) == (str(answers), str(tokens_answered))
    assert int(found["prompt tokens read"].replace(",", "")) > 0


@pytest.fixture(scope="module")
def talkative_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never ends an answer by itself, and has room for a long one."""
    directory = tmp_path_factory.mktemp("talkative")
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "max_position_embeddings": 20_000}), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps({"suppress_tokens": [2]}), encoding="utf-8")
    return directory


def test_help_is_quick(root: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run(root, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "--prompt_style" in result.stdout
    # CPU time: the promise is for a machine that does nothing else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_answer_alone_on_standard_output(root: Path, tiny_model_dir: Path) -> None:
    result = run(
        root,
        *("--model_path", tiny_model_dir, "--do_sample", "False", "--max_new_tokens", 8),
        *("--input_txt", QUESTIONS[0]),
    )
    assert result.returncode == 0
    assert result.stdout == greedy(tiny_model_dir, QUESTIONS[0], 8) + "\n"
    # Nothing but our own notes: no library has anything to say about a healthy run.
    lines = result.stderr.splitlines()
    assert lines[0] == f"[{tiny_model_dir}: 150,336 parameters, fp32, cpu]"
    assert lines[1] == "[stopped at --max_new_tokens 8]"
    check_totals(lines[2:], answers=1, tokens_answered=8)


def test_a_tokenizer_that_warns(root: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """What libraries say about settings that are as they should be is not passed on."""
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["legacy"]
    path.write_text(json.dumps({**config, "model_max_length": 10}), encoding="utf-8")
    (directory / "generation_config.json").write_text('{"do_sample": true, "top_p": 0.9}', encoding="utf-8")
    result = run(root, "--model_path", directory, "--no-do_sample", "--max_new_tokens", 2, "--input_txt", "x")
    assert result.returncode == 0
    check_totals(result.stderr.splitlines()[2:], answers=1, tokens_answered=2)


def test_several_prompts(root: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ("--model_path", tiny_model_dir, "--do_sample", "False", "--max_new_tokens", 5)
    expected = [greedy(tiny_model_dir, question, 5) for question in QUESTIONS]
    as_text = run(root, *options, "--input_file", "-", stdin="\n".join(QUESTIONS) + "\n")
    assert as_text.stdout == "\n\n".join(expected) + "\n"
    path = tmp_path / "prompts.jsonl"
    long = "long " * 600
    prompts = [QUESTIONS[0], long, QUESTIONS[1]]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    as_jsonl = run(root, *options, "--input_file", path)
    assert [json.loads(line) for line in as_jsonl.stdout.splitlines()] == [
        {"prompt": prompt, "answer": answer, "num_tokens": 5, "stopped_by": "max_new_tokens"}
        for prompt, answer in zip(QUESTIONS, expected, strict=True)
    ]
    # The others are answered, and the one that does not fit is an error all the same.
    assert as_jsonl.returncode == 2
    *lines, error = as_jsonl.stderr.splitlines()
    assert error.startswith("error: prompt 2: the prompt has")
    check_totals(lines[1:], answers=2, tokens_answered=10)


def test_sampling_repeats_with_its_seed(root: Path, tiny_model_dir: Path) -> None:
    options = ("--model_path", tiny_model_dir, "--temperature", 1, "--max_new_tokens", 12, "--input_txt", "a")
    first, again, other = (run(root, *options, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_bad_input(root: Path, tmp_path: Path) -> None:
    result = run(root, "--model_path", tmp_path, "--top_p", 2, "--input_txt", "x")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("error: ") == 2
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": 3}\n', encoding="utf-8")
    result = run(root, "--model_path", "owner/name", "--input_file", path)
    assert (result.returncode, result.stderr) == (2, f"error: {path}:1: 'prompt' is a number, not a string\n")


@pytest.mark.parametrize("mode", ["--chat", "--input_file=-"])
def test_closed_standard_input(root: Path, tiny_model_dir: Path, mode: str) -> None:
    words = command(root, "--model_path", tiny_model_dir, mode)
    result = subprocess.run(["bash", "-c", '"$@" <&-', "bash", *words], capture_output=True, text=True)
    assert result.returncode == (0 if mode == "--chat" else 2)
    assert "Traceback" not in result.stderr


def test_reader_that_goes_away(root: Path, talkative_model_dir: Path) -> None:
    arguments = ("--model_path", talkative_model_dir, "--max_new_tokens", 10_000, "--input_txt", "x")
    process = subprocess.Popen(
        command(root, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(1)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 0
    process.stderr.close()


def test_ctrl_c_ends_a_single_answer(root: Path, talkative_model_dir: Path) -> None:
    arguments = ("--model_path", talkative_model_dir, "--max_new_tokens", 10_000, "--input_txt", "x")
    process = subprocess.Popen(
        command(root, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_ctrl_c_stops_an_answer_of_a_conversation(root: Path, talkative_model_dir: Path) -> None:
    process = subprocess.Popen(
        command(root, "--model_path", talkative_model_dir, "--chat", "--max_new_tokens", 10_000),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    for _ in range(2):
        process.stdin.write(b"Where is the river?\n")
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert b"[stopped]\n" in iter(process.stderr.readline, b"")
        # All of the answer was written before the note: what comes now belongs to the next.
        os.set_blocking(process.stdout.fileno(), False)
        while process.stdout.read(1 << 16):
            pass
        os.set_blocking(process.stdout.fileno(), True)
    process.stdin.write(b"exit\n")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.startswith(b"inference"), "only the summary"


def test_conversation_at_a_terminal(root: Path, tiny_model_dir: Path) -> None:
    """A person types at a prompt; the end of input (Ctrl-D) ends the program."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(
            root, "--model_path", tiny_model_dir, "--chat", "--max_new_tokens", 4, "--do_sample", "False"
        ),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    output = b""
    for typed in (QUESTIONS[0].encode() + b"\n", b"clear\n", b"\x04"):
        while not output.endswith(b"Human: "):
            output += os.read(controller, 1000)
        output += b"|"
        os.write(controller, typed)
    assert process.wait(60) == 0
    os.close(controller)
    answer = greedy(tiny_model_dir, QUESTIONS[0], 4)
    assert answer in output.decode()
    assert b"the conversation is forgotten" in output
