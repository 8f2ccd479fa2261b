"""The base that is made again from an extended tokenizer encodes as the source did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_cases import load_fast, run_extension

from colossal_llama.tokenizer.base_vocabulary import find_replaced_tokens, load_base
from colossal_llama.tokenizer.new_rows import find_new_rows
from colossal_llama.tokenizer.subtokens import encode_tokens, token_table
from colossal_llama.tokenizer.tokenizer_files import read_tokenizer_files
from colossal_llama.utils.errors import UserError

PIECES = ["人工智能", "人工", "图书馆", "the moon", "江", "é", "智能"]


@pytest.fixture(params=["llama2_tokenizer_dir", "llama3_tokenizer_dir"], scope="module")
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def extended(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("extended") / "tokenizer"
    run_extension(source, target, PIECES, "add")
    return target


snippets = st.sampled_from([*PIECES, " ", "\n", "river", "the moon ", "。", "学"]) | st.text(max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(snippets, max_size=8).map(lambda parts: "x" + "".join(parts)))
def test_it_encodes_as_the_source(source: Path, extended: Path, text: str) -> None:
    wanted = load_cached(source).encode(text, add_special_tokens=False).ids
    assert load_cached(extended).encode(text, add_special_tokens=False).ids == wanted


_loaded: dict[Path, object] = {}


def load_cached(directory: Path):
    """The Rust tokenizer of a source, or the base of an extended one."""
    if directory not in _loaded:
        new_rows = find_new_rows(directory)
        _loaded[directory] = (
            load_base(directory, new_rows) if new_rows else load_fast(directory).backend_tokenizer
        )
    return _loaded[directory]


def test_replaced_tokens_are_those_that_a_new_row_is_made_from(source: Path, extended: Path) -> None:
    new_rows = find_new_rows(extended)
    assert len(new_rows) >= len(PIECES)
    names = token_table(read_tokenizer_files(extended, "x"))
    wanted = encode_tokens(read_tokenizer_files(source, "x"), [names[i] for i in new_rows])
    assert find_replaced_tokens(extended, new_rows) == dict(zip(new_rows, wanted, strict=True))


def test_new_rows(source: Path, extended: Path, tmp_path: Path) -> None:
    base = len(load_fast(source))
    assert find_new_rows(extended) == range(base, len(load_fast(extended)))
    assert not find_new_rows(source)
    report = tmp_path / "vocabulary_extension.json"
    report.write_text(json.dumps({"counts": {}}))
    with pytest.raises(UserError, match=r"vocabulary_extension\.json: does not say which rows are new"):
        find_new_rows(tmp_path)
