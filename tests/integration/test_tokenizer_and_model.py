"""The commands as users run them: corpus to pieces to tokenizer to model, and what they say to mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = {
    "init_tokenizer": "colossal_llama/tokenizer/init_tokenizer.py",
    "learn_pieces": "colossal_llama/tokenizer/learn_pieces.py",
    "compare_tokenizers": "colossal_llama/tokenizer/compare_tokenizers.py",
    "init_model": "colossal_llama/model/init_model.py",
}


@pytest.fixture
def run(root: Path):
    def run(script: str, expected_code: int = 0, **flags: object) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / SCRIPTS[script])]
        command += [f"--{name}={value}" for name, value in flags.items()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == expected_code, result.stderr
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def corpus(root: Path, tmp_path: Path) -> Path:
    sys.path.insert(0, str(root / "tests"))
    from corpus import sample_texts

    directory = tmp_path / "corpus"
    directory.mkdir()
    records = [{"source": "", "target": text, "category": "x"} for text in sample_texts(100)]
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


@pytest.fixture
def llama3_model_dir(llama3_tokenizer_dir: Path, root: Path, tmp_path: Path) -> Path:
    from support import load_script
    from transformers import AutoTokenizer

    directory = tmp_path / "llama3_model"
    shutil.copytree(llama3_tokenizer_dir, directory)
    rows = len(AutoTokenizer.from_pretrained(directory))
    maker = load_script(root / "examples" / "make_base_model.py")
    maker.make_model(directory, rows, hidden_size=64, num_layers=2, num_heads=4, max_positions=256, seed=0)
    return directory


@pytest.mark.parametrize("source_fixture", ["tiny_model_dir", "llama3_model_dir"])
def test_from_corpus_to_model(
    run, corpus: Path, tmp_path: Path, request: pytest.FixtureRequest, source_fixture: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = request.getfixturevalue(source_fixture)
    pieces, target = tmp_path / "pieces.jsonl", tmp_path / "target"
    run(
        "learn_pieces", data_input_dirs=corpus, source_tokenizer_dir=source, output_file=pieces, num_tokens=80
    )
    result = run(
        "init_tokenizer",
        source_tokenizer_dir=source,
        target_tokenizer_dir=target,
        expand_tokens_file=pieces,
        unreachable="error",
    )
    assert result.stdout.splitlines()[-1] == f"Tokenizer: {target}"
    result = run(
        "init_model",
        source_model_and_tokenizer_path=source,
        target_tokenizer_path=target,
        target_model_path=target,
        pad_to_multiple_of=8,
    )
    assert result.stdout.splitlines()[-1] == f"Model: {target}"
    tokenizer, model = AutoTokenizer.from_pretrained(target), AutoModelForCausalLM.from_pretrained(target)
    assert model.config.vocab_size == -(-len(tokenizer) // 8) * 8
    ids = tokenizer("人工智能", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).shape[1] == ids.shape[1] + 4
    result = run("compare_tokenizers", tokenizer_dirs=f"{source},{target}", data_input_dirs=corpus)
    rates = [float(line.split()[-2]) for line in result.stdout.splitlines()[-2:]]
    assert rates[1] < 0.8 * rates[0]


def test_seed_environment_is_accepted(run, tiny_model_dir: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pieces.jsonl").write_text('{"piece": "人工"}\n')
    flags = {"source_tokenizer_dir": tiny_model_dir, "expand_tokens_file": tmp_path / "pieces.jsonl"}
    run("init_tokenizer", target_tokenizer_dir=tmp_path / "a", **flags)
    monkeypatch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    run("init_tokenizer", target_tokenizer_dir=tmp_path / "b", **flags)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_all_bad_arguments_at_once(run, tmp_path: Path) -> None:
    result = run(
        "init_tokenizer",
        2,
        source_tokenizer_dir=tmp_path / "nowhere",
        expand_tokens_file=tmp_path / "nothing.jsonl",
        unreachable="maybe",
    )
    for flag in ("--source_tokenizer_dir", "--expand_tokens_file", "--unreachable", "--target_tokenizer_dir"):
        assert flag in result.stderr


def test_invalid_pieces_leave_nothing_behind(run, tiny_model_dir: Path, tmp_path: Path) -> None:
    pieces = tmp_path / "pieces.jsonl"
    pieces.write_text('{"piece": "人工"}\n{"piece": 1}\nnonsense\n')
    result = run(
        "init_tokenizer",
        2,
        source_tokenizer_dir=tiny_model_dir,
        target_tokenizer_dir=tmp_path / "target",
        expand_tokens_file=pieces,
    )
    assert f"{pieces}:2" in result.stderr
    assert f"{pieces}:3" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.jsonl"]


@pytest.mark.parametrize("target", ["source", "link to the source", "under a file", "with a model"])
def test_unusable_targets(run, tiny_model_dir: Path, tmp_path: Path, target: str) -> None:
    pieces, source = tmp_path / "pieces.jsonl", tmp_path / "source"
    pieces.write_text('{"piece": "人工"}\n')
    shutil.copytree(tiny_model_dir, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    shutil.copytree(source, tmp_path / "model")
    place = {
        "source": source,
        "link to the source": tmp_path / "link",
        "under a file": pieces / "target",
        "with a model": tmp_path / "model",
    }[target]
    result = run(
        "init_tokenizer",
        2,
        source_tokenizer_dir=source,
        target_tokenizer_dir=place,
        expand_tokens_file=pieces,
    )
    assert "target" in result.stderr
    if target != "with a model":
        result = run(
            "init_model",
            2,
            source_model_and_tokenizer_path=source,
            target_tokenizer_path=source,
            target_model_path=place,
        )
        assert "target" in result.stderr
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_tokenizer_can_be_made_anew_in_its_place(run, tiny_model_dir: Path, tmp_path: Path) -> None:
    pieces, target = tmp_path / "pieces.jsonl", tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for words in (["人工", "智能"], ["图书"]):
        pieces.write_text("".join(json.dumps({"piece": word}) + "\n" for word in words))
        run(
            "init_tokenizer",
            source_tokenizer_dir=tiny_model_dir,
            target_tokenizer_dir=target,
            expand_tokens_file=pieces,
        )
        if len(words) == 2:
            (target / "added_tokens.json").write_text('{"<stale>": 7}')
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(target).get_vocab()
    assert "图书" in vocabulary
    assert "人工" not in vocabulary
    assert (target / "notes.txt").read_text() == "mine"
    assert not (target / "added_tokens.json").exists()
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_killed_model_initialisation_can_be_repeated(
    run, root: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """kill -9 at several moments: no config.json without all weights, and a second run completes."""
    pieces, tokenizer = tmp_path / "pieces.jsonl", tmp_path / "tokenizer"
    pieces.write_text('{"piece": "人工"}\n')
    run(
        "init_tokenizer",
        source_tokenizer_dir=tiny_model_dir,
        target_tokenizer_dir=tokenizer,
        expand_tokens_file=pieces,
    )
    flags = {"source_model_and_tokenizer_path": tiny_model_dir, "target_tokenizer_path": tokenizer}
    run("init_model", target_model_path=tmp_path / "whole", **flags)
    expected = (tmp_path / "whole" / "model.safetensors").read_bytes()
    target = tmp_path / "target"
    command = [sys.executable, str(root / SCRIPTS["init_model"]), f"--target_model_path={target}"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    for delay in (0.3, 0.8, 1.1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (target / "config.json").exists():
            assert (target / "model.safetensors").read_bytes() == expected
    target.mkdir(exist_ok=True)
    (target / ".model.safetensors.tmp").write_bytes(b"left by a run that was killed")
    run("init_model", target_model_path=target, **flags)
    assert (target / "model.safetensors").read_bytes() == expected
    assert not list(target.glob(".*"))
