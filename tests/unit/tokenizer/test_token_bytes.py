"""Tokens joined are the text, byte for byte, for every form that a LLaMA tokenizer comes in."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import sample_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import load_fast, make_proto, run_extension, write_sentencepiece
from tokenizers import Tokenizer

from colossal_llama.tokenizer.token_bytes import TokenBytes

PIECES = ["人工智能", "人工", "中国", "▁人", "the moon", "▁▁A", "é", "A▁B"]
PARTS = [
    *("A", "the ", "x", "人工", "智能", "中国人", "乾坤", "é", "e\u0301", "😀", " moon", "a b", "1,234"),
    *(" ", "  ", "   ", "▁", "▁▁", "▁A", "\t", "\n", " \n", "\u3000", "\u00a0", "\ufeff", "\u200b", "\0", ""),
    *("<s>", "</s>", "<unk>", "<|eot_id|>", "<0x41>", "word", " word", "word "),
]
FORMS = [
    *[f"llama2 {legacy} {made}" for legacy in ("legacy", "new") for made in ("slow", "prepend", "extended")],
    *("llama2 no prefix", "llama3", "llama3 extended", "llama3 prefix"),
]


def random_texts(seed: int, count: int, without: str = "") -> list[str]:
    generator = random.Random(seed)
    parts = [part for part in PARTS if not without or without not in part]
    return ["".join(generator.choices(parts, k=generator.randint(0, 8))) for _ in range(count)]


def _as_published(directory: Path) -> None:
    """A `tokenizer.json` in the form of Meta's own conversion: Prepend and Replace."""
    fast = json.loads(load_fast(directory).backend_tokenizer.to_str())
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fast |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    (directory / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")


@pytest.fixture(scope="module")
def forms(
    llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Directories of all forms; every one but the byte-level ones has an ordinary added word too."""
    root = tmp_path_factory.mktemp("forms")
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    made = {}
    for legacy in (True, False):
        for form in ("slow", "prepend", "extended"):
            name = f"llama2 {'legacy' if legacy else 'new'} {form}"
            directory = root / name.replace(" ", "-")
            shutil.copytree(llama2_tokenizer_dir, directory)
            (directory / "tokenizer.json").unlink(missing_ok=True)
            path = directory / "tokenizer_config.json"
            config = {**json.loads(path.read_text()), "legacy": legacy}
            config.pop("add_prefix_space", None)
            config["added_tokens_decoder"] = {"500": {"content": "word", **flags}}
            path.write_text(json.dumps(config))
            if form == "prepend":
                _as_published(directory)
            if form == "extended":
                run_extension(directory, root / f"{directory.name}-target", PIECES)
                directory = root / f"{directory.name}-target"
            made[name] = directory
    proto = make_proto(["▁", "a", "b", "ab", "▁a", "人"], add_dummy_prefix=False)
    made["llama2 no prefix"] = write_sentencepiece(root / "none", proto, legacy=True, add_prefix_space=False)
    made["llama3"] = llama3_tokenizer_dir
    run_extension(llama3_tokenizer_dir, root / "llama3-extended", ["人工智能", "中国", " 人", "moon"])
    made["llama3 extended"] = root / "llama3-extended"
    shutil.copytree(llama3_tokenizer_dir, root / "llama3-prefix")
    fast = json.loads((llama3_tokenizer_dir / "tokenizer.json").read_text())
    fast["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    (root / "llama3-prefix" / "tokenizer.json").write_text(json.dumps(fast))
    made["llama3 prefix"] = root / "llama3-prefix"
    return made


def load(directory: Path) -> tuple[TokenBytes, Tokenizer, Any]:
    tokenizer = load_fast(directory)
    table = TokenBytes.of_tokenizer(tokenizer)
    assert table is not None
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True  # as data is prepared
    return table, backend, tokenizer


def check(table: TokenBytes, backend: Tokenizer, text: str) -> None:
    encoding = backend.encode(text, add_special_tokens=False)
    ends = table.ends_in(text, encoding.ids)
    assert ends is not None, (text, encoding.tokens)
    content = text.encode()
    assert len(ends) == len(encoding.ids)
    assert (ends[-1] if len(ends) else 0) == len(content)
    for token_id, start, end in zip(encoding.ids, [0, *ends], ends, strict=False):
        own, found = table.contents[token_id], content[start:end]
        if table.writes_spaces_as_symbol:
            found = found.replace("▁".encode(), b" ")
        assert found in (own, own.removeprefix(b" ")), (text, encoding.tokens)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_joined_are_the_text(forms: dict[str, Path], form: str) -> None:
    table, backend, _ = load(forms[form])
    for text in [*sample_texts(100, seed=5), *random_texts(1, 1500)]:
        check(table, backend, text)


@settings(max_examples=150)
@given(
    text=st.text(st.one_of(st.sampled_from("▁ Aa\n人é😀"), st.characters(codec="utf-8"))),
    form=st.sampled_from(FORMS),
)
def test_any_text(forms: dict[str, Path], text: str, form: str) -> None:
    table, backend, _ = load(forms[form])
    check(table, backend, text)


@pytest.mark.parametrize("form", FORMS)
def test_counted_bytes_are_those_of_the_text(forms: dict[str, Path], form: str) -> None:
    """From ids alone, behind BOS; where the tokenizer keeps the difference, spaces at the start included."""
    table, backend, tokenizer = load(forms[form])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    symbol = "▁" if table.writes_spaces_as_symbol else ""
    for text in [*sample_texts(50, seed=6), *random_texts(2, 1000, without=symbol)]:
        if table.prefix is not None and table.prefix.spares_spaces and " " in text:
            # " a" and "a" have the same ids.
            text = text.lstrip(" ").replace("word ", "word")
        ids = np.array([bos, *backend.encode(text, add_special_tokens=False).ids, eos])
        assert table.count(ids[1:], ids[:-1], bos) == len(text.encode()), text


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_and_padded_ids_have_no_bytes(forms: dict[str, Path], form: str) -> None:
    table, _, tokenizer = load(forms[form])
    special = np.array(sorted({*tokenizer.all_special_ids, len(table.contents) + 7, -100}))
    for previous in (tokenizer.bos_token_id, 5):
        assert table.count(special, np.full(len(special), previous), tokenizer.bos_token_id) == 0


def test_borders_agree_with_the_offsets_of_the_library(forms: dict[str, Path]) -> None:
    """Where a token is made of whole characters and starts with no space (those overlap in the library)."""
    for form in FORMS:
        table, backend, _ = load(forms[form])
        compared = 0
        for text in sample_texts(60, seed=7):
            encoding = backend.encode(text, add_special_tokens=False)
            bytes_before = [0, *itertools.accumulate(len(character.encode()) for character in text)]
            ends = table.ends_in(text, encoding.ids)
            assert ends is not None
            for token_id, (_, end_character), end in zip(encoding.ids, encoding.offsets, ends, strict=True):
                try:
                    table.contents[token_id].decode()
                except UnicodeDecodeError:
                    continue
                if len(table.contents[token_id]) > 1 and not table.contents[token_id].startswith(b" "):
                    assert end == bytes_before[end_character]
                    compared += 1
        assert compared > 50 or form == "llama2 no prefix"


def test_literal_u2581_has_three_bytes_where_the_text_is_known(forms: dict[str, Path]) -> None:
    table, backend, _ = load(forms["llama2 new prepend"])
    text = "A▁ ▁▁人"
    ids = backend.encode(text, add_special_tokens=False).ids
    ends = table.ends_in(text, ids)
    assert ends is not None
    assert ends[-1] == len(text.encode()) == 14
    assert table.lengths[ids].sum() - 1 == 8  # the ids alone: a byte for each, the prefix left out


def test_what_cannot_be_put_together_is_told(forms: dict[str, Path]) -> None:
    table, backend, _ = load(forms["llama2 legacy prepend"])
    ids = backend.encode("the moon", add_special_tokens=False).ids
    assert table.ends_in("the sun", ids) is None
    assert table.ends_in("the moon and more", ids) is None
    assert table.ends_in("the moon", [*ids, 10**6]) is None
    assert list(table.ends_in("", [])) == []
    word_piece = {
        "model": {"type": "WordPiece", "vocab": {"a": 0}},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    }
    assert TokenBytes.of_json(json.dumps(word_piece)) is None
