"""The mistakes that a newcomer is most likely to make: the message alone says what to do.

What needs more than a command line is tested where it belongs: full disks in unit/training/checkpoint and
test_tokenizer_and_model.py, flags that changed before a resume in test_resume.py, ports that are in use in
tests/unit/launch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = ("train.py", "--plugin", "zero2", "--mixed_precision", "bf16")
PREPARE = ("prepare_pretrain_dataset.py", "--data_output_dirs", "out")


@pytest.fixture
def directory(tmp_path: Path, llama2_tokenizer_dir: Path) -> Path:
    """Where the commands run: a tokenizer, three directories of input, a hostfile."""
    (tmp_path / "tokenizer").symlink_to(llama2_tokenizer_dir)
    for name, content in {
        "prepared/arrow/part-00000/readme": "",
        "model/config.json": "{}",
        "run/modeling/config.json": "{}",
        "chats/a.jsonl": '{"messages": [{"from": "human", "content": "Hello"}]}\n',
        "texts/a.jsonl": '{"text": "Hello"}\n',
        "words/a.txt": "Hello",
        "hostfile": "node-1 slots=8\n# a comment\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def refused(root: Path, directory: Path, command: tuple[str, ...], search_path: str) -> str:
    """What a command that ends with exit code 2 says; without a GPU, and with nobody to answer questions."""
    script, *arguments = command
    result = subprocess.run(
        [sys.executable, str(root / script), *arguments],
        capture_output=True,
        text=True,
        cwd=directory,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": search_path},
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            (*TRAIN, "--pretrained", "no/model", "--dataset", "prepared/arrow"),
            ["--pretrained no/model: no such directory, and no model of the Hugging Face hub"],
        ),
        (
            ("inference_example.py", "--model_path", "run", "--input_txt", "Hello"),
            ["--model_path run: the directory has no config.json", "; use run/modeling"],
        ),
        (
            (
                *("inference_example.py", "--model_path", "run/modeling", "--input_txt", "Hello"),
                *("--device", "cuda:0"),
            ),
            ["--device cuda:0: torch finds no GPU here; use --device cpu or auto"],
        ),
        (
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "texts,nowhere"),
            ["--data_input_dirs texts,nowhere: nowhere: no such directory"],
        ),
        (
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "words"),
            ["--data_input_dirs words: holds no *.jsonl"],
        ),
        (
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "chats", "--num_workers", "1"),
            ["chats/a.jsonl:1: is a conversation (found 'messages'); use prepare_sft_dataset.py for these"],
        ),
        (
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "texts", "--num_workers", "1"),
            ["texts/a.jsonl:1: 'source' is missing (found 'text'); give --text_field text"],
        ),
        (
            (
                *("prepare_sft_dataset.py", "--tokenizer_dir", "tokenizer", "--data_input_dirs", "chats"),
                *("--data_output_dirs", "out"),
            ),
            ["--llama_version 3: turns end with <|eot_id|>, which the tokenizer", "use --llama_version 2"],
        ),
        (
            (
                *("colossal_llama/launch/preflight.py", "--hostfile", "hostfile", "--nproc_per_node", "8"),
                *(*TRAIN, "--pretrained", "model", "--dataset", "prepared/arrow"),
            ),
            [
                'hostfile:1: "node-1 slots=8": no slots or options; give one host name or address per line',
                'hostfile:2: "# a comment": `colossalai run` takes comments for host names',
            ],
        ),
    ],
    ids=lambda value: None if isinstance(value, list) else value[0],
)
def test_the_message_alone_is_enough(
    root: Path, directory: Path, command: tuple[str, ...], expected: list[str]
) -> None:
    errors = refused(root, directory, command, str(root))
    assert "Traceback" not in errors
    for message in expected:
        assert message in errors
    assert not list((directory / "out").rglob("part-*"))


@pytest.mark.parametrize(
    ("package", "command", "expected"),
    [
        (
            "ray",
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "texts", "--ray_address", "auto"),
            "--ray_address auto: No module named 'ray'; pip install ray",
        ),
        (
            "zstandard",
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "packed"),
            "packed/a.jsonl.zst: reading .zst needs a library: pip install zstandard",
        ),
        (
            "s3fs",
            (*PREPARE, "--tokenizer_dir", "tokenizer", "--data_input_dirs", "s3://bucket/texts"),
            "--data_input_dirs s3://bucket/texts: reading s3:// needs a library: pip install s3fs",
        ),
    ],
    ids=["ray", "zstandard", "s3fs"],
)
def test_a_package_that_is_not_installed(
    root: Path, directory: Path, package: str, command: tuple[str, ...], expected: str
) -> None:
    (directory / "packed").mkdir()
    (directory / "packed" / "a.jsonl.zst").write_bytes(b"\0")
    hidden = directory / "hidden" / package
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')\n"
    )
    errors = refused(root, directory, command, f"{hidden.parent}:{root}")
    assert errors.replace(f"{directory}/", "").strip() == f"error: {expected}"
