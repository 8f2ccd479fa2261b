"""What the slow and the fast tokenizer of a source agree on, those of the extended one agree on."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import load_fast, load_slow, run_extension

from colossal_llama.tokenizer.agreement import compare_forms, probe_texts
from colossal_llama.utils.errors import UserError

PIECES = ["人工智能", "人工", "智能", "中国", "▁人", "的 人", "the moon", "A B", "s>", "▁▁A"]
PARTS = [
    *("A", "the", "x", "人工", "智能", "中国人", "乾", "é", "😀", "moon", "a b", "<", "s>", "foo", "<w>"),
    *(" ", "  ", "   ", "▁", "▁▁", "\t", "\n", " \n", "\u3000", "\u00a0", ""),
    *("<s>", "</s>", "<unk>", "<s> ", "</s>  ", "</s>▁", "foo ", " foo", "<L>", "<R>", "<S>", "<S> ", "<N>"),
]
# Ordinary added words, which no list of special tokens names, with every flag that they can have.
ORDINARY: dict[str, dict[str, bool]] = {
    "foo": {},
    "<w>": {"normalized": True},
    "a b": {"normalized": True},
    "<R>": {"rstrip": True},
    "<N>": {"single_word": True},
}
STRIPS_ON_THE_LEFT = {"<L>": {"lstrip": True}}
SPECIAL = {"<S>": {"special": True}}


def texts_of(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return ["".join(generator.choices(PARTS, k=generator.randint(0, 7))) for _ in range(count)]


def make_source(
    model_only: Path, directory: Path, settings: dict[str, Any], form: str, words: dict[str, dict]
) -> Path:
    """A source whose `tokenizer.json` is absent, as transformers converts it, or as Meta published it."""
    shutil.copytree(model_only, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["legacy"]
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    config["added_tokens_decoder"] = {
        str(index): {"content": word, **flags, **own} for index, (word, own) in enumerate(words.items(), 500)
    }
    config["additional_special_tokens"] = [word for word in words if word in SPECIAL]
    prefix = {name: settings.pop(name) for name in ("add_prefix_space",) if name in settings}
    path.write_text(json.dumps({**config, **settings}))
    if form != "no tokenizer.json":
        fast = json.loads(load_fast(directory).backend_tokenizer.to_str())
        if form == "Prepend":
            prepend = {"type": "Prepend", "prepend": "▁"}
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            fast["normalizer"] = {"type": "Sequence", "normalizers": [prepend, replace]}
            fast["pre_tokenizer"] = None
        (directory / "tokenizer.json").write_text(json.dumps(fast))
    path.write_text(json.dumps({**config, **settings, **prefix}))
    return directory


def newly_different(source: Path, target: Path, texts: list[str]) -> list[str]:
    forms = [load(directory) for directory in (source, target) for load in (load_slow, load_fast)]
    found = []
    for plain in (False, True):
        # One by one: in batches, transformers' slow tokenizers leave the argument out.
        encoded = [[form(t, split_special_tokens=plain).input_ids for t in texts] for form in forms]
        for text, *ids in zip(texts, *encoded, strict=True):
            if ids[0] == ids[1] and ids[2] != ids[3]:
                found.append(text)
    return found


@pytest.mark.parametrize("form", ["no tokenizer.json", "converted", "Prepend"])
@pytest.mark.parametrize("legacy", [{"legacy": False}, {"legacy": True}, {}], ids=str)
def test_no_new_disagreement(
    llama2_tokenizer_dir: Path, tmp_path: Path, legacy: dict[str, bool], form: str
) -> None:
    prefixes = ({}, *({"add_prefix_space": value} for value in (None, True, False)))
    every_word = ORDINARY | STRIPS_ON_THE_LEFT | SPECIAL
    cases = itertools.product(({}, ORDINARY, every_word), prefixes if legacy else prefixes[:1])
    for number, (words, stated) in enumerate(cases):
        case, target = {**legacy, **stated}, tmp_path / f"target{number}"
        source = make_source(llama2_tokenizer_dir, tmp_path / f"source{number}", dict(case), form, words)
        try:
            run_extension(source, target, PIECES)
        except UserError as error:  # one form puts a prefix and the other does not: refused
            assert "puts a space before every text" in str(error)  # noqa: PT017
            assert legacy.get("legacy", True)
            continue
        found = newly_different(source, target, texts_of(number, 100))
        # What is left, stated in docs/vocabulary.md: an ordinary word at the start of a text, or behind
        # spaces there, where `add_prefix_space: null` made the slow form leave out the prefix that the fast
        # one puts; a literal ▁ before a token that takes spaces on its left.
        ordinary = [word for word in words if word not in SPECIAL]
        rest = [r"[▁\s]*▁\s*<L>"] if "<L>" in words else []
        if ordinary and stated == {"add_prefix_space": None} and legacy.get("legacy") is False:
            rest.append(rf"[▁\s]*({'|'.join(map(re.escape, ordinary))})")
        assert [text for text in found if not any(re.match(r, text) for r in rest)] == [], (case, form, words)


def test_text_after_special_tokens_and_at_the_start(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    """The kind of source that most users have: `legacy` off, no `tokenizer.json`."""
    report = run_extension(llama2_tokenizer_dir, tmp_path / "target", PIECES)
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text, tokens in {
        "A": ["▁A"],
        " A": ["▁▁A"],
        "▁A": ["▁▁A"],
        "<s>A": ["<s>", "A"],
        "<s> A": ["<s>", "▁A"],
        "<s>  A": ["<s>", "▁▁A"],
        "A</s>▁A": ["▁A", "</s>", "▁A"],
    }.items():
        assert slow.tokenize(text) == fast.tokenize(text) == tokens
    counts = report["slow_and_fast"]
    assert counts["new_disagreements"] == 0
    assert counts["first_new"] is None
    # Of the source as transformers converts it: no prefix before a space.
    assert counts["source_disagreements"] > 0
    assert counts["first_of_the_source"]["text"].startswith((" ", "▁"))
    for text in texts_of(1, 3000):
        if "foo" not in text:
            assert slow(text).input_ids == fast(text).input_ids, text


def test_an_extended_tokenizer_can_be_extended(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run_extension(llama2_tokenizer_dir, first, ["人工"])
    report = run_extension(first, second, PIECES)
    assert report["notes"] == []
    assert report["slow_and_fast"]["source_disagreements"] == 0
    assert report["slow_and_fast"]["new_disagreements"] == 0
    old, new = (json.loads((d / "tokenizer.json").read_text()) for d in (first, second))
    assert {k: v for k, v in old.items() if k != "model"} == {k: v for k, v in new.items() if k != "model"}


def test_what_is_left_is_counted_with_its_first_text(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    words = {"foo": {"normalized": False}, "<S>": {"special": True}}
    settings = {"legacy": False, "add_prefix_space": None}
    source = make_source(llama2_tokenizer_dir, tmp_path / "source", settings, "converted", words)
    report = run_extension(source, tmp_path / "target", PIECES)
    counts = report["slow_and_fast"]
    assert counts["new_disagreements"] > 0
    assert counts["first_new"] == {"text": "foo", "slow": ["▁", "foo"], "fast": ["foo"]}
    agreement = compare_forms(source, tmp_path / "target", PIECES)
    assert agreement.num_texts == counts["probe_texts"] > 500
    assert all(case.text.lstrip().startswith("foo") for case in agreement.new)
    assert str(agreement.new[0]) == "'foo': slow ▁ foo, fast foo"


def test_a_source_that_disagrees_with_itself_is_counted_only(
    llama2_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """An ordinary word at the start: the slow form puts the prefix before it, the fast one none at all."""
    source = make_source(
        llama2_tokenizer_dir, tmp_path / "source", {"legacy": False}, "no tokenizer.json", {"foo": {}}
    )
    counts = run_extension(source, tmp_path / "target", PIECES)["slow_and_fast"]
    assert counts["source_disagreements"] > 0
    assert counts["new_disagreements"] == 0


def test_a_byte_level_tokenizer_has_one_form(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    assert "slow_and_fast" not in run_extension(llama3_tokenizer_dir, tmp_path / "target", PIECES)


def test_what_transformers_can_not_load_is_not_compared(
    llama2_tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(llama2_tokenizer_dir, source := tmp_path / "source")
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sp_model_kwargs": 5}))
    assert run_extension(source, tmp_path / "target", PIECES)["slow_and_fast"] is None
    assert "slow and fast form are not compared" in capsys.readouterr().err


def test_probe_texts_are_fixed() -> None:
    texts = probe_texts(["<s>", "foo"])
    assert texts == probe_texts(["<s>", "foo"])
    assert len(set(texts)) == len(texts)
    assert {" <s>  A", "foo<s>", "▁foo▁", "\n\nA", "<s> <s>"} <= set(texts)
