"""Extended LLaMA-2 tokenizers against sentencepiece and transformers: agreement, old texts, ids, refusals."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import CHINESE, sample_texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_cases import (
    NORMAL,
    UNUSED,
    USER_DEFINED,
    load_fast,
    load_slow,
    make_proto,
    run_extension,
    write_sentencepiece,
)

from colossal_llama.tokenizer.sentencepiece_extension import merges_by_score, next_lower_score
from colossal_llama.utils.errors import UserError

WORDS = ["人工智能", "人工", "智能", "中国", "人民", "中华人民共和国", "▁人", "的 人", "the moon", "图书馆"]
AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    "\t a",
    " 人工",
    "人工 ",
    "▁人工",
    "乾坤",
    "a▁b",
    "\u0000",
    "😀人工",
    "e\u0301",
    "　人工",
]


def read_proto(directory: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString((directory / "tokenizer.model").read_bytes())


def random_texts(count: int, seed: int, pieces: list[str]) -> list[str]:
    """Pieces, their halves, Latin and other characters in every order."""
    generator = random.Random(seed)
    parts = [
        *pieces,
        *(piece[1:] for piece in pieces),
        *(piece[:-1] for piece in pieces),
        " ",
        "  ",
        "\n",
        "the",
        "x",
    ]
    parts += ["乾", "é", "😀", ">", "<", "。"]
    return ["".join(generator.choices(parts, k=generator.randint(1, 8))) for _ in range(count)]


@pytest.fixture(
    scope="module", params=[False, True, None], ids=["legacy off", "legacy on", "legacy unstated"]
)
def source(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, tmp_path_factory: Any) -> Path:
    directory = tmp_path_factory.mktemp("source")
    shutil.copytree(llama2_tokenizer_dir, directory, dirs_exist_ok=True)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["legacy"]
    if request.param is not None:
        config["legacy"] = request.param
    config["chat_template"] = "{{ messages[0]['content'] }}"
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.mark.parametrize("mode", ["report", "add", "drop"])
def test_slow_and_fast_agree(source: Path, tmp_path: Path, mode: str) -> None:
    run_extension(source, tmp_path / "target", WORDS, mode)
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    assert not slow.is_fast
    assert fast.is_fast
    assert slow.get_vocab() == fast.get_vocab()
    for text in [*AWKWARD, *sample_texts(60), *random_texts(1500, 0, [w.replace("▁", " ") for w in WORDS])]:
        ids = slow(text).input_ids
        assert ids == fast(text).input_ids, text
        if not slow.legacy:  # transformers' legacy decoding of special tokens differs between the two
            assert slow.decode(ids) == fast.decode(ids), text


def test_special_tokens_in_the_middle(source: Path, tmp_path: Path) -> None:
    run_extension(source, tmp_path / "target", WORDS)
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text in ["</s>人工", "人工</s>智能", "人工智能</s>", "<s> 人工", "<s>  人工", "a</s><s>b"]:
        assert slow(text).input_ids == fast(text).input_ids, text


def test_text_without_added_pieces_is_encoded_as_before(source: Path, tmp_path: Path) -> None:
    report = run_extension(source, tmp_path / "target", WORDS, "add")
    old, new, fast = load_slow(source), load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    added = {*WORDS, *report["characters"], *report["intermediates"]}
    texts = [*sample_texts(100, chinese=False), "乾坤", "日本語", "élan", "  x\n y", "😀"]
    num_untouched = 0
    for text in texts:
        if any(piece.replace(" ", "▁") in "▁" + text.replace(" ", "▁") for piece in added):
            continue  # an English text with a part of "the moon"
        num_untouched += 1
        assert new(text).input_ids == old(text).input_ids
        assert fast(text).input_ids == old(text).input_ids
    assert num_untouched > 20


def test_settings_are_kept_and_ids_follow(source: Path, tmp_path: Path) -> None:
    report = run_extension(source, tmp_path / "target", [*WORDS, "人工"])
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "target" / name).read_bytes() == (source / name).read_bytes()
    old, new = read_proto(source), read_proto(tmp_path / "target")
    assert list(new.pieces[: len(old.pieces)]) == list(old.pieces)
    assert new.normalizer_spec == old.normalizer_spec
    assert new.trainer_spec.vocab_size == len(new.pieces)
    added = [piece.piece for piece in new.pieces[len(old.pieces) :]]
    assert added[: len(WORDS)] == [word.replace(" ", "▁") for word in WORDS]
    assert added[len(WORDS) :] == report["characters"]
    counts = report["counts"]
    assert counts["duplicates_in_the_file"] == 1
    assert counts["target_vocabulary_size"] == len(new.pieces)
    assert load_fast(tmp_path / "target").chat_template == "{{ messages[0]['content'] }}"


def test_present_pieces_are_counted(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    piece = read_proto(llama2_tokenizer_dir).pieces[300].piece
    report = run_extension(llama2_tokenizer_dir, tmp_path / "target", ["人工", piece])
    assert report["present_already"] == [piece]
    assert report["counts"]["pieces_added"] == 1


def test_scores_fall_strictly_below_the_source(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    run_extension(llama2_tokenizer_dir, tmp_path / "target", WORDS, "add")
    old, new = read_proto(llama2_tokenizer_dir), read_proto(tmp_path / "target")
    scores = [piece.score for piece in new.pieces[len(old.pieces) :]]
    assert scores[0] < min(piece.score for piece in old.pieces)
    assert all(later < earlier for earlier, later in itertools.pairwise(scores))


def test_scores_fall_where_float32_has_no_ones(tmp_path: Path) -> None:
    """Whitespace runs of one 32k tokenizer have the score -1e9, where float32 steps are 64 wide."""
    proto = make_proto([("▁", -1.0), ("▁▁", -1e9), ("a", -2.0)])
    source = write_sentencepiece(tmp_path / "source", proto)
    run_extension(source, tmp_path / "target", ["人工", "工人", "人工工人", "工工"])
    scores = [np.float32(piece.score) for piece in read_proto(tmp_path / "target").pieces[-6:]]
    assert all(later < earlier for earlier, later in itertools.pairwise([np.float32(-1e9), *scores]))
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text in map("".join, itertools.product("人工", repeat=7)):
        assert slow(text).input_ids == fast(text).input_ids


def test_no_score_left() -> None:
    assert next_lower_score(0.0) == -1.0
    with pytest.raises(UserError, match="no score is left"):
        next_lower_score(float(np.finfo(np.float32).min))


def test_missing_characters_are_added_in_every_mode(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Without 乾 and 坤 sentencepiece would join them to 乾坤 and the fast tokenizer would not."""
    for mode in ("report", "add", "drop", "error"):
        report = run_extension(llama2_tokenizer_dir, tmp_path / mode, ["乾坤"], mode)
        assert report["characters"] == ["乾", "坤"]
        slow, fast = load_slow(tmp_path / mode), load_fast(tmp_path / mode)
        assert slow.tokenize("x乾坤")[-1] == fast.tokenize("x乾坤")[-1] == "乾坤"


def test_unreachable_modes(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    pieces = ["人工", "图书馆"]
    report = run_extension(llama2_tokenizer_dir, tmp_path / "report", pieces, "report")
    assert list(report["unreachable"]) == ["图书馆"]
    assert report["unreachable"]["图书馆"] == ["图", "书", "馆"]
    assert "图书馆" not in load_slow(tmp_path / "report").tokenize("在图书馆里")

    report = run_extension(llama2_tokenizer_dir, tmp_path / "add", pieces, "add")
    assert len(report["intermediates"]) == 1
    assert "图书馆" in load_slow(tmp_path / "add").tokenize("在图书馆里")

    report = run_extension(llama2_tokenizer_dir, tmp_path / "drop", pieces, "drop")
    assert list(report["dropped"]) == ["图书馆"]
    assert report["characters"] == ["人", "工"]
    assert "图书馆" not in load_slow(tmp_path / "drop").get_vocab()

    with pytest.raises(UserError) as caught:
        run_extension(llama2_tokenizer_dir, tmp_path / "error", pieces, "error")
    assert "error.jsonl:2: piece '图书馆'" in caught.value.problems[0]
    assert not (tmp_path / "error").exists()


def test_reachability_is_about_running_text_not_the_dummy_prefix(tmp_path: Path) -> None:
    """Alone, ▁人工 is split ▁人 + 工; after another character 人工 is a token all the same."""
    source = write_sentencepiece(tmp_path / "source", make_proto(["▁人", "人", "工", "▁", "x"]))
    report = run_extension(source, tmp_path / "target", ["人工"])
    assert report["unreachable"] == {}
    slow = load_slow(tmp_path / "target")
    assert "人工" not in slow.tokenize("人工")
    assert "人工" in slow.tokenize("x人工")


def test_inner_spaces_become_part_of_the_piece(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    report = run_extension(llama2_tokenizer_dir, tmp_path / "target", ["的 人", "▁的▁书"], "add")
    assert report["counts"]["pieces_added"] == 2
    slow = load_slow(tmp_path / "target")
    assert "的▁人" in slow.tokenize("x的 人")
    assert "▁的▁书" in slow.tokenize("x 的 书")


def added_token(token_id: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": special}
    return {str(token_id): {"content": content, **flags}}


@pytest.mark.parametrize("how", ["decoder", "added_tokens.json", "implicit", "tokenizer.json"])
def test_added_tokens_beyond_the_pieces_keep_their_ids(
    llama2_tokenizer_dir: Path, tmp_path: Path, how: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    special = json.loads((source / "special_tokens_map.json").read_text(encoding="utf-8"))
    if how in ("decoder", "tokenizer.json"):
        config["added_tokens_decoder"] = added_token(500, "<pad>") | added_token(501, "<word>", special=False)
        config["pad_token"] = "<pad>"
    elif how == "added_tokens.json":
        (source / "added_tokens.json").write_text('{"<pad>": 500, "<word>": 501}', encoding="utf-8")
        special["pad_token"] = "<pad>"
    else:
        special["pad_token"] = "<pad>"
    path.write_text(json.dumps(config), encoding="utf-8")
    (source / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    if how == "tokenizer.json":
        load_fast(source).save_pretrained(source)
        # transformers writes "add_prefix_space": null, on which slow and fast disagree; a test of its own is
        # below.
        saved = json.loads(path.read_text(encoding="utf-8"))
        del saved["add_prefix_space"]
        path.write_text(json.dumps(saved), encoding="utf-8")
    old = load_slow(source)
    assert old.convert_tokens_to_ids("<pad>") == 500
    report = run_extension(source, tmp_path / "target", ["人工", "<pad", "智能"])
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    assert slow.get_vocab() == fast.get_vocab()
    assert len(slow) == len(fast) == report["counts"]["target_vocabulary_size"]
    for token, token_id in old.get_vocab().items():
        assert slow.convert_ids_to_tokens(token_id) == fast.convert_ids_to_tokens(token_id) == token
    first_new = len(old)
    assert slow.convert_ids_to_tokens(first_new) == "人工"
    for text in ["人工<pad>智能", "a<pad>", "x<word>人工", "<pad"]:
        assert slow(text).input_ids == fast(text).input_ids, text
        if "人" not in text and text != "<pad":
            assert slow(text).input_ids == old(text).input_ids
    assert 500 in slow("a<pad>").input_ids
    assert 500 not in slow("a<pad>", split_special_tokens=True).input_ids


def test_gap_before_an_added_token_is_refused(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = added_token(505, "<pad>")
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="no token has id 500"):
        run_extension(source, tmp_path / "target", ["人工"])


def test_existing_fast_tokenizer_is_kept_but_for_its_vocabulary(
    llama2_tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    load_fast(llama2_tokenizer_dir).save_pretrained(source)
    report = run_extension(source, tmp_path / "target", ["人工", "智能", "图书馆"], "add")
    assert any("starts with a space" in note for note in report["notes"])
    assert any("add_prefix_space" in note for note in report["notes"])
    old, new = (json.loads((d / "tokenizer.json").read_text()) for d in (source, tmp_path / "target"))
    for part in ("post_processor", "decoder", "added_tokens"):
        assert new[part] == old[part]
    kept = {tuple(merge) for merge in old["model"]["merges"]}
    assert [m for m in map(tuple, new["model"]["merges"]) if m in kept] == [
        tuple(m) for m in old["model"]["merges"]
    ]
    slow, fast, fast_before = (
        load_slow(tmp_path / "target"),
        load_fast(tmp_path / "target"),
        load_fast(source),
    )
    for text in [*sample_texts(60), *random_texts(500, 1, WORDS)]:
        assert slow(text).input_ids == fast(text).input_ids, text
    for text in sample_texts(60, chinese=False):
        assert fast(text).input_ids == fast_before(text).input_ids


@pytest.mark.parametrize("has_fast", [False, True])
@pytest.mark.parametrize("stated", [{}, {"add_prefix_space": True}, {"add_prefix_space": None}], ids=str)
def test_every_way_to_state_the_prefix(
    llama2_tokenizer_dir: Path, tmp_path: Path, stated: dict[str, Any], has_fast: bool
) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    if has_fast:
        load_fast(llama2_tokenizer_dir).save_pretrained(source)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("add_prefix_space", None)
    # transformers writes this number where no limit is stated.
    path.write_text(json.dumps({**config, "legacy": False, "model_max_length": int(1e30), **stated}))
    run_extension(source, tmp_path / "target", WORDS)
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text in [*AWKWARD, *random_texts(300, 0, [w.replace("▁", " ") for w in WORDS])]:
        assert slow(text).input_ids == fast(text).input_ids, text
    assert slow.model_max_length == int(1e30)


@pytest.mark.parametrize(
    ("dummy_prefix", "settings"),
    [
        (True, {"legacy": True, "add_prefix_space": False}),
        (False, {"legacy": True, "add_prefix_space": True}),
        (False, {"legacy": True}),
    ],
)
def test_a_prefix_of_one_form_alone_is_refused_and_the_advice_works(
    tmp_path: Path, dummy_prefix: bool, settings: dict[str, Any]
) -> None:
    proto = make_proto(["▁", "a", "b", "▁a"], add_dummy_prefix=dummy_prefix)
    source = write_sentencepiece(tmp_path / "source", proto, **settings)
    load_fast(source).backend_tokenizer.save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match="puts a space before every text") as caught:
        run_extension(source, tmp_path / "target", ["人工"])
    (problem,) = caught.value.problems
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text())
    as_fast = {"legacy": False, "add_prefix_space": "true" in problem.rpartition("add_prefix_space")[2]}
    path.write_text(json.dumps({**config, **as_fast}))
    expected = load_fast(source)("a b").input_ids
    run_extension(source, tmp_path / "as_fast", ["人工"])
    assert load_slow(tmp_path / "as_fast")("a b").input_ids == expected
    assert load_fast(tmp_path / "as_fast")("a b").input_ids == expected
    config.pop("add_prefix_space", None)
    path.write_text(json.dumps(config))
    (source / "tokenizer.json").unlink()
    expected = load_slow(source)("a b").input_ids
    run_extension(source, tmp_path / "as_slow", ["人工"])
    assert load_slow(tmp_path / "as_slow")("a b").input_ids == expected
    assert load_fast(tmp_path / "as_slow")("a b").input_ids == expected


def test_fast_tokenizer_in_the_form_of_the_published_llama_2(
    llama2_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Its `tokenizer.json` puts the prefix by a normalizer, though the configuration says `legacy` is off."""
    source = tmp_path / "source"
    shutil.copytree(llama2_tokenizer_dir, source)
    fast = json.loads(load_fast(llama2_tokenizer_dir).backend_tokenizer.to_str())
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fast |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}, "pre_tokenizer": None}
    (source / "tokenizer.json").write_text(json.dumps(fast), encoding="utf-8")
    report = run_extension(source, tmp_path / "target", WORDS, "add")
    assert report["notes"] == []
    new = json.loads((tmp_path / "target" / "tokenizer.json").read_text())
    assert new["normalizer"] == fast["normalizer"]
    slow, fast_target = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text in [*AWKWARD, *random_texts(800, 2, WORDS)]:
        assert slow(text).input_ids == fast_target(text).input_ids, text


def test_fast_tokenizer_of_another_vocabulary_is_refused(llama2_tokenizer_dir: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    load_fast(llama2_tokenizer_dir).save_pretrained(source)
    path = source / "tokenizer.json"
    fast = json.loads(path.read_text())
    vocabulary = fast["model"]["vocab"]
    vocabulary["the"], vocabulary["▁the"] = vocabulary.get("▁the", 300), vocabulary.get("the", 301)
    path.write_text(json.dumps(fast))
    with pytest.raises(UserError, match=r"tokenizer\.json: token"):
        run_extension(source, tmp_path / "target", ["人工"])


@pytest.mark.parametrize(
    ("proto", "config", "reason"),
    [
        (make_proto(["a"], model_type=1), {}, "unigram"),
        (make_proto(["a"], model_type=3), {}, "word"),
        (make_proto(["a"], other=[("b", UNUSED)]), {}, "UNUSED"),
        (make_proto(["a"]), {"tokenizer_class": "T5Tokenizer"}, "T5Tokenizer"),
    ],
)
def test_unsuitable_sources_are_refused(tmp_path: Path, proto: Any, config: dict, reason: str) -> None:
    source = write_sentencepiece(tmp_path / "source", proto, **config)
    with pytest.raises(UserError, match=reason):
        run_extension(source, tmp_path / "target", ["人工"])
    assert not (tmp_path / "target").exists()


def test_rewriting_normalizers_are_refused(tmp_path: Path) -> None:
    proto = make_proto(["a"])
    proto.normalizer_spec.remove_extra_whitespaces = True
    source = write_sentencepiece(tmp_path / "source", proto)
    with pytest.raises(UserError, match="rewrites text"):
        run_extension(source, tmp_path / "target", ["人工"])


def test_tiktoken_file_is_named(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "source", make_proto(["a"]))
    (source / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match="tiktoken"):
        run_extension(source, tmp_path / "target", ["人工"])


def test_user_defined_symbols_can_not_be_part_of_a_piece(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "source", make_proto(["a", "人"], other=[("工", USER_DEFINED)]))
    with pytest.raises(UserError, match="own token '工'"):
        run_extension(source, tmp_path / "target", ["人工"])


def test_tied_scores_of_the_source_are_noted(tmp_path: Path) -> None:
    proto = make_proto([("a", -1.0), ("b", -2.0), ("ab", 0.0), ("ba", 0.0)])
    report = run_extension(write_sentencepiece(tmp_path / "source", proto), tmp_path / "target", ["人"])
    assert "share their score" in report["notes"][0]


def test_merges_never_build_bytes_or_special_tokens(tmp_path: Path) -> None:
    source = write_sentencepiece(tmp_path / "source", make_proto([*"<0xE4>s▁", "s>", "E4"]))
    run_extension(source, tmp_path / "target", ["<0x", "E4>", "<s"], "add")
    slow, fast = load_slow(tmp_path / "target"), load_fast(tmp_path / "target")
    for text in ["<0xE4>", "a<0xE4>b", "<s", "x<s>y"]:
        assert (
            slow(text, split_special_tokens=True).input_ids == fast(text, split_special_tokens=True).input_ids
        )


def test_merge_order_is_that_of_transformers(llama2_tokenizer_dir: Path) -> None:
    fast = json.loads(load_fast(llama2_tokenizer_dir).backend_tokenizer.to_str())
    pieces = read_proto(llama2_tokenizer_dir).pieces
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    assert merges_by_score(scores) == [tuple(merge) for merge in fast["model"]["merges"]]


han = st.text(alphabet="人工智能中国的一", min_size=1, max_size=5)
mixed = st.text(
    alphabet=st.one_of(st.sampled_from("人工智能中国的一 ▁ab<>"), st.characters(codec="utf-8")), max_size=20
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(han, min_size=1, max_size=15, unique=True),
    st.lists(mixed, min_size=1, max_size=25),
    st.sampled_from(["report", "add", "drop"]),
    st.booleans(),
)
def test_any_pieces_any_unicode(
    llama2_tokenizer_dir: Path, pieces: list[str], texts: list[str], mode: str, legacy: bool
) -> None:
    """Slow and fast agree on every text, and texts without added pieces are encoded as by the source."""
    from sentencepiece import SentencePieceProcessor
    from transformers import LlamaTokenizer, LlamaTokenizerFast

    with tempfile.TemporaryDirectory() as name:
        target = Path(name) / "target"
        source = write_sentencepiece(Path(name) / "source", read_proto(llama2_tokenizer_dir), legacy=legacy)
        try:
            run_extension(source, target, pieces, mode)
        except UserError as error:
            assert "nothing to add" in str(error) and mode == "drop"  # noqa: PT017, PT018
            return
        slow, fast = LlamaTokenizer.from_pretrained(target), LlamaTokenizerFast.from_pretrained(target)
        old, new = (SentencePieceProcessor(model_file=str(d / "tokenizer.model")) for d in (source, target))
    added = [new.id_to_piece(token_id) for token_id in range(len(old), len(new))]
    for text in [*texts, *pieces, "".join(pieces), " ".join(pieces), *CHINESE[:2]]:
        if any(token in text for token in ("<s>", "</s>", "<unk>")):
            continue
        ids = slow(text, add_special_tokens=False).input_ids
        assert ids == fast(text, add_special_tokens=False).input_ids
        if not any(piece in "▁" + text.replace(" ", "▁") for piece in added):
            assert new.encode(text) == old.encode(text)
