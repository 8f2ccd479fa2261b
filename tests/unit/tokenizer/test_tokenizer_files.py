"""Tokenizer directories that were written by hand, or by a later transformers, are explained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colossal_llama.dataset import preparation
from colossal_llama.inference import loading
from colossal_llama.tokenizer import compare_tokenizers
from colossal_llama.tokenizer.source import open_source
from colossal_llama.training import model as training_model
from colossal_llama.utils.errors import UserError

READERS: dict[str, Callable[[Path], Any]] = {
    "extension": lambda directory: open_source(directory, "--source_tokenizer_dir"),
    "preparation": preparation.load_tokenizer,
    "comparison": compare_tokenizers.load_tokenizer,
    "inference": lambda directory: loading.load_tokenizer(None, str(directory), str(directory), False),
    "training": lambda directory: training_model.load_tokenizer(str(directory), False),
}


@pytest.mark.parametrize("reader", READERS)
def test_settings_of_transformers_5(llama3_tokenizer_dir: Path, tmp_path: Path, reader: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama3_tokenizer_dir, source)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|eot_id|>"]}
    path.write_text(json.dumps({**config, **new}))
    with pytest.raises(UserError) as caught:
        READERS[reader](source)
    assert len(caught.value.problems) == 2
    assert f"{path}: " in caught.value.problems[0]
    assert "write PreTrainedTokenizerFast" in caught.value.problems[0]
    assert "call it additional_special_tokens" in caught.value.problems[1]
    # What is advised works.
    mended = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|eot_id|>"]}
    path.write_text(json.dumps({**config, **mended}))
    READERS[reader](source)


@pytest.mark.parametrize("reader", READERS)
def test_code_that_comes_with_a_tokenizer_is_not_run(
    llama2_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    """Not even where standard input says yes to all questions."""
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    (source / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass\n")
    path = source / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    monkeypatch.setattr("builtins.input", lambda _: "y")
    with pytest.raises(UserError):
        READERS[reader](source)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"<pad>": null}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": {}}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["<pad>"]}'),
    ],
)
def test_added_tokens_in_another_form(
    llama2_tokenizer_dir: Path, tmp_path: Path, name: str, content: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    (source / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: its added tokens are not written"):
        READERS["extension"](source)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[]", "(not a JSON object but an array; copy|its added tokens are not written)"),
        (b"null", "(not a JSON object but null; copy|its added tokens are not written)"),
        (b'{\n"a" 1}', r":2: not valid JSON \(.*\); copy the tokenizer again"),
        (b"\xff\xfe{", r"not UTF-8 text \(byte 0\); copy the tokenizer again"),
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    ],
)
def test_damaged_json_is_named_whoever_reads_it(
    llama2_tokenizer_dir: Path, tmp_path: Path, reader: str, name: str, content: bytes, complaint: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    (source / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(source / name))}.*{complaint}"):
        READERS[reader](source)
