"""Tokenizer directories that were written by hand, or by a later transformers, are explained."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import run_extension
from transformers import AutoTokenizer

from colossal_llama.dataset import tokenizer_copy
from colossal_llama.inference import loading
from colossal_llama.model.init_model import ModelSettings, _copy_small_files
from colossal_llama.tokenizer import compare_tokenizers
from colossal_llama.tokenizer.source import open_source
from colossal_llama.tokenizer.tokenizer_files import copy_tokenizer, files_of_tokenizer, settings_of
from colossal_llama.training.llama import loading as training_loading
from colossal_llama.utils.errors import UserError

READERS: dict[str, Callable[[Path], Any]] = {
    "extension": lambda directory: open_source(directory, "--source_tokenizer_dir"),
    "preparation": tokenizer_copy.load_tokenizer,
    "comparison": compare_tokenizers.load_tokenizer,
    "inference": lambda directory: loading.load_tokenizer(None, str(directory), str(directory), False),
    "training": lambda directory: training_loading.load_tokenizer(str(directory), False),
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


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "extension"])
def test_a_prefix_that_slow_and_fast_read_differently_is_named(
    llama2_tokenizer_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture, reader: str
) -> None:
    """Earlier versions wrote it into every trained LLaMA-2; `init_tokenizer.py` leaves it out."""
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    READERS[reader](source)
    assert capfd.readouterr().err == ""
    AutoTokenizer.from_pretrained(source).save_pretrained(source)
    READERS[reader](source)
    said = capfd.readouterr().err
    assert said.startswith(f'warning: {source / "tokenizer_config.json"}: "add_prefix_space": null makes')


OTHERS = {
    "added_tokens.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "tokenization_own.py": "# own\n",
}


def test_all_files_of_a_tokenizer_go_into_what_is_made_of_it(
    llama2_tokenizer_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    source, target, model = (tmp_path / name for name in ("source", "target", "model"))
    shutil.copytree(llama2_tokenizer_dir, source)
    for name, content in OTHERS.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content)
    run_extension(source, target, ["人工", "智能"])
    shutil.rmtree(source / "additional_chat_templates")
    (target / "program.py").write_text("the user's own\n")
    model.mkdir()
    _copy_small_files(ModelSettings(tiny_model_dir, target, model))
    for directory in (target, model):
        for name, content in OTHERS.items():
            assert (directory / name).read_text() == content
    for name in ("tokenizer.json", "tokenizer.model", "vocabulary_extension.json", "tokenizer_config.json"):
        assert (model / name).read_bytes() == (target / name).read_bytes()
    # What is made anew from a source without them has none, and a user's own programs stay.
    run_extension(source, target, ["人工", "智能"])
    assert not (target / "additional_chat_templates" / "tools.jinja").exists()
    assert (target / "program.py").exists()


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


# In a form that no program would write again: spacing, order, line ends, a key of someone's own.
UNUSUAL_SETTINGS = {
    "special_tokens_map.json": b'{"eos_token":\t"</s>",\r\n "bos_token": "<s>"  }',
    "added_tokens.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}\r\n\n",
    "chat_template.json": b'{"chat_template":"x"}',
    "additional_chat_templates/tool use.jinja": "工具\r\n".encode(),
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "tokenization_own.py": b"from .helper_of_own import x\r\n",
    "helper_of_own.py": b"x = 1",
}
UNUSUAL_CONFIG = {
    "own_key": {"b": [1, 2.50, None], "a": "\u00e9"},
    "model_max_length": int(1e30),
    "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
}


def add_unusual_settings(directory: Path) -> dict[str, bytes]:
    """Gives a tokenizer every file that one can have; returns all of its settings."""
    path = directory / "tokenizer_config.json"
    config = json.dumps({**json.loads(path.read_text()), **UNUSUAL_CONFIG}, separators=(" ,", ": "))
    contents = {**UNUSUAL_SETTINGS, "tokenizer_config.json": config.encode()}
    for name, content in contents.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return contents


@pytest.mark.parametrize("fixture", ["llama2_tokenizer_dir", "llama3_tokenizer_dir"])
def test_everything_but_the_vocabulary_travels_byte_for_byte(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str
) -> None:
    """Into the extended tokenizer, and from there to a model that had another one."""
    source, target, model = tmp_path / "source", tmp_path / "target", tmp_path / "model"
    shutil.copytree(request.getfixturevalue(fixture), source)
    contents = add_unusual_settings(source)
    if fixture == "llama3_tokenizer_dir":  # has no <s>
        contents["special_tokens_map.json"] = b"{\r\n}"
        (source / "special_tokens_map.json").write_bytes(b"{\r\n}")
    (source / "notes.txt").write_text("no part of the tokenizer")
    assert set(settings_of(source)) == contents.keys()
    run_extension(source, target, ["人工"])
    assert {name: (target / name).read_bytes() for name in settings_of(target)} == contents
    assert not (target / "notes.txt").exists()

    shutil.copytree(request.getfixturevalue("llama3_tokenizer_dir"), model)
    (model / "modeling_own.py").write_text("the model's")
    (model / "vocab.json").write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "stale.jinja").write_text("")
    copy_tokenizer(target, model)
    expected = {name: (target / name).read_bytes() for name in files_of_tokenizer(target)}
    assert "vocabulary_extension.json" in expected
    expected["modeling_own.py"] = b"the model's"
    assert {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*.*") if p.is_file()} == expected


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
