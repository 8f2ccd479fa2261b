"""Extended LLaMA-3 tokenizers: special tokens keep their ids, old texts their encoding, pieces occur."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corpus import CHINESE, sample_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LLAMA3_SPECIAL_TOKENS
from tokenizer_cases import load_fast, run_extension
from tokenizers import Tokenizer

from colossal_llama.tokenizer.byte_alphabet import CHARACTER_OF, byte_token, token_bytes
from colossal_llama.utils.errors import UserError

WORDS = ["人工智能", "人工", "智能", "中国", "人民", "图书馆", " 人", "人"]


def changed_source(source: Path, target: Path, change: Callable[[dict], None]) -> Path:
    shutil.copytree(source, target)
    fast = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    change(fast)
    (target / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    return target


def new_bytes(source: Path, target: Path) -> list[bytes]:
    """The bytes of every token that the target has and the source has not."""
    old, new = (json.loads((d / "tokenizer.json").read_text())["model"]["vocab"] for d in (source, target))
    return [token_bytes(t) for t in new if t not in old and t not in LLAMA3_SPECIAL_TOKENS]


def test_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(CHARACTER_OF.values()) == set(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ["a b\n人", "é😀\x00\x7f\xa0\xad"]:
        assert byte_token(text) == splitter.pre_tokenize_str(text)[0][0]
        assert token_bytes(byte_token(text)).decode() == text
    for code in (*range(0x300), 0xFFFF, 0x10000):
        if chr(code) not in CHARACTER_OF.values():
            with pytest.raises(KeyError):
                token_bytes(f"a{chr(code)}")


@pytest.mark.parametrize("mode", ["report", "add", "drop"])
def test_ids_of_the_source_stay(llama3_tokenizer_dir: Path, tmp_path: Path, mode: str) -> None:
    report = run_extension(llama3_tokenizer_dir, tmp_path / "target", WORDS, mode)
    old, new = load_fast(llama3_tokenizer_dir), load_fast(tmp_path / "target")
    for token, token_id in old.get_vocab().items():
        assert new.convert_ids_to_tokens(token_id) == token
        assert new.convert_tokens_to_ids(token) == token_id
    assert len(new) == report["counts"]["target_vocabulary_size"]
    assert sorted(new.get_vocab().values()) == list(range(len(new)))
    assert new.convert_ids_to_tokens(len(old)) == byte_token("人工智能")
    assert (new.bos_token_id, new.eos_token_id) == (old.bos_token_id, old.eos_token_id)
    text = "hi<|eot_id|>人工"
    assert new(text).input_ids[0] == old.bos_token_id
    assert old.convert_tokens_to_ids("<|eot_id|>") in new(text).input_ids
    assert old.convert_tokens_to_ids("<|eot_id|>") not in new(text, split_special_tokens=True).input_ids
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "target" / name).read_bytes() == (llama3_tokenizer_dir / name).read_bytes()


@pytest.mark.parametrize("mode", ["report", "add"])
def test_reachable_pieces_occur_in_running_text(
    llama3_tokenizer_dir: Path, tmp_path: Path, mode: str
) -> None:
    report = run_extension(llama3_tokenizer_dir, tmp_path / "target", WORDS, mode)
    tokenizer = load_fast(tmp_path / "target")
    unreachable = set(report["unreachable"])
    assert ("图书馆" in unreachable) == (mode == "report")
    for piece in WORDS:
        # 乾 is in no piece: it keeps the piece apart from its neighbours, within one pre-token.
        tokens = tokenizer.tokenize(f"乾{piece}乾")
        assert (byte_token(piece) in tokens) == (piece not in unreachable), piece
    for text in [*sample_texts(60), *CHINESE]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_text_without_new_tokens_is_encoded_as_before(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    run_extension(llama3_tokenizer_dir, tmp_path / "target", WORDS, "add")
    old, new = (
        Tokenizer.from_file(str(d / "tokenizer.json")) for d in (llama3_tokenizer_dir, tmp_path / "target")
    )
    added = new_bytes(llama3_tokenizer_dir, tmp_path / "target")
    characters = [chr(code) for code in range(0x4E00, 0x9FFF, 3)]
    same = touched = 0
    for text in [*characters, *sample_texts(100), "😀", "日本語 x"]:
        if any(token in text.encode() for token in added):
            touched += 1
        else:
            same += 1
            assert new.encode(text).ids == old.encode(text).ids
    assert same > 3000
    assert touched > 100  # parts of characters are counted as intermediates


def test_partial_intermediates_are_counted_and_noted(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    report = run_extension(llama3_tokenizer_dir, tmp_path / "target", ["人", "丁"])
    assert report["intermediates"] == ["äº", "ä¸"]
    assert report["counts"]["intermediates_added"] == 2
    assert "parts of characters" in report["notes"][0]


def test_pieces_that_the_pre_tokenizer_cuts(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    pieces = ["人工", "你好。世界", "1234"]
    report = run_extension(llama3_tokenizer_dir, tmp_path / "report", pieces, "report")
    assert set(report["unreachable"]) == {"你好。世界", "1234"}
    report = run_extension(llama3_tokenizer_dir, tmp_path / "add", pieces, "add")
    assert set(report["dropped"]) == {"你好。世界", "1234"}
    assert report["counts"]["pieces_added"] == 1
    with pytest.raises(UserError, match=r"error\.jsonl:2"):
        run_extension(llama3_tokenizer_dir, tmp_path / "error", pieces, "error")


def test_merges_keep_the_form_of_the_source(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    def as_text(fast: dict[str, Any]) -> None:
        fast["model"]["merges"] = [" ".join(merge) for merge in fast["model"]["merges"]]

    source = changed_source(llama3_tokenizer_dir, tmp_path / "source", as_text)
    run_extension(source, tmp_path / "target", WORDS)
    merges = json.loads((tmp_path / "target" / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)
    assert byte_token("人工") in load_fast(tmp_path / "target").tokenize("在人工")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fast: fast.update(pre_tokenizer=None), "neither byte-level BPE"),
        (lambda fast: fast.update(normalizer={"type": "NFC"}), "NFC"),
        (
            lambda fast: fast["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "a space before",
        ),
        (lambda fast: fast["added_tokens"][-1].update(id=700), "no token has id"),
        (lambda fast: fast["added_tokens"][-1].update(content="PAD"), "plain word"),
    ],
)
def test_unsuitable_sources_are_refused(
    llama3_tokenizer_dir: Path, tmp_path: Path, change: Callable[[dict], None], reason: str
) -> None:
    source = changed_source(llama3_tokenizer_dir, tmp_path / "source", change)
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=reason):
        run_extension(source, tmp_path / "target", ["人工"])
    assert not (tmp_path / "target").exists()


han = st.text(alphabet="人工智能中国的一乾坤", min_size=1, max_size=5)
mixed = st.text(
    alphabet=st.one_of(st.sampled_from("人工智能中国的一乾坤 ab1。"), st.characters(codec="utf-8")),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(han, min_size=1, max_size=15, unique=True),
    st.lists(mixed, min_size=1, max_size=25),
    st.sampled_from(["report", "add", "drop"]),
)
def test_any_pieces_any_unicode(
    llama3_tokenizer_dir: Path, pieces: list[str], texts: list[str], mode: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "target"
        try:
            report = run_extension(llama3_tokenizer_dir, target, pieces, mode)
        except UserError as error:
            assert "nothing to add" in str(error)  # noqa: PT017
            return
        old, new = (Tokenizer.from_file(str(d / "tokenizer.json")) for d in (llama3_tokenizer_dir, target))
        added = new_bytes(llama3_tokenizer_dir, target)
    for text in [*texts, *pieces, "".join(pieces), " ".join(pieces)]:
        ids = new.encode(text, add_special_tokens=False).ids
        assert new.decode(ids) == text
        if not any(token in text.encode() for token in added):
            assert ids == old.encode(text, add_special_tokens=False).ids
    for piece in pieces:
        whole = byte_token(piece) in new.encode(f"日{piece}日").tokens
        assert whole == (piece not in {**report["unreachable"], **report["dropped"]})


def test_no_intermediate_is_superfluous(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    from colossal_llama.tokenizer.byte_level_extension import ByteLevelSource
    from colossal_llama.tokenizer.reachability import unreachable_pieces
    from colossal_llama.tokenizer.tokenizer_files import read_tokenizer_files

    generator = random.Random(0)
    pieces = list(
        {"".join(generator.choices("人工智能中国的一乾坤", k=generator.randint(2, 5))) for _ in range(30)}
    )
    report = run_extension(llama3_tokenizer_dir, tmp_path / "target", pieces, "add")
    source = ByteLevelSource(read_tokenizer_files(llama3_tokenizer_dir, "--source_tokenizer_dir"))
    needed = [byte_token(token) for token in [*pieces, *report["characters"]]]
    for left_out in report["intermediates"]:
        tokens = [*needed, *(token for token in report["intermediates"] if token != left_out)]
        scores = {token: -float(rank) for rank, token in enumerate(tokens)}
        assert unreachable_pieces(needed, source.symbols_of, scores)
