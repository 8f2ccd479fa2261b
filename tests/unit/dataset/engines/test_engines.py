"""Ids and bytes are the same whatever engine encodes, and an engine that errs is caught."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus import sample_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.conversation.stretches import follow_special_tokens
from colossal_llama.corpus import jsonl
from colossal_llama.dataset import engine_choice, preparation
from colossal_llama.dataset.engine_choice import find_candidate
from colossal_llama.dataset.engines import (
    ENGINES,
    TESTED_VERSIONS,
    installed_version,
    load_engine,
)
from colossal_llama.dataset.engines.checked import (
    CheckedEngine,
    EngineDifference,
    NotForThisTokenizer,
    find_words,
    is_checked,
    raise_difference,
    read_vocabulary,
)
from colossal_llama.dataset.engines.huggingface import TokenizersEngine
from colossal_llama.dataset.engines.trial import find_form, write_form
from colossal_llama.dataset.preparation import prepare
from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    SftSettings,
    WorkerSettings,
)
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.utils.errors import UserError

KINDS = ["llama2", "llama2 prepend", "llama2 extended form", "llama2 with a word", "llama3"]
PARTS = [
    *(
        "A",
        "the ",
        "river",
        "人工",
        "智能",
        "乾坤",
        "é",
        "e\u0301",
        "😀",
        " moon",
        "a b",
        "1,234",
        "word",
        "Word",
    ),
    *(" ", "  ", "▁", "▁A", "\t", "\n", " \n", "\u3000", "\u00a0", "\ufeff", "\u200b", "\0", "<s>", "</s>"),
    *("<unk>", "<|eot_id|>", "<0x41>", "don't"),
]
texts = st.lists(st.sampled_from(PARTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=4))
texts = texts.map("".join)
POISON = "the river of poison"
needs_tuetoken = pytest.mark.skipif(
    installed_version("tuetoken") is None, reason="needs tuetoken: pip install -e '.[fast]'"
)


class PoisonedEngine(TokenizersEngine):
    """Gives a wrong id on one text, which no trial has."""

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        for text, ids in zip(texts, super().encode(texts), strict=True):
            yield [*ids[:-1], ids[-1] ^ 1] if POISON in text else ids


class SpacelessEngine(TokenizersEngine):
    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        return iter(super().encode([text.replace("  ", " ") for text in texts]))


class NeverAsked:
    """A reference that no text is left to."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        assert not texts
        return []

    def encode_with_borders(self, texts: Sequence[str], positions: Sequence[int]) -> Any:
        raise AssertionError(texts)


def late_poison() -> str:
    """A text of the sample that is checked while the engine works."""
    return next(text for number in range(10**6) if is_checked(text := f"{POISON} {number}"))


@pytest.fixture(scope="module")
def json_of(
    llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The serialised tokenizer of a kind."""
    root = tmp_path_factory.mktemp("serialised")

    def make(kind: str) -> Path:
        directory = llama3_tokenizer_dir if kind.startswith("llama3") else llama2_tokenizer_dir
        value = json.loads(AutoTokenizer.from_pretrained(directory).backend_tokenizer.to_str())
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        if kind == "llama2 prepend":
            steps = [{"type": "Prepend", "prepend": "▁"}, replace]
            value |= {"normalizer": {"type": "Sequence", "normalizers": steps}, "pre_tokenizer": None}
        if kind == "llama2 extended form":  # as init_tokenizer.py writes it for `legacy: false`
            space = {"type": "Metaspace", "replacement": " ", "prepend_scheme": "first", "split": False}
            never = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
            value |= {
                "normalizer": replace,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, never]},
            }
        if kind == "llama2 with a word":
            flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
            value["added_tokens"].append({"id": 500, "content": "word", "special": False, **flags})
        path = root / f"{kind.replace(' ', '-')}.json"
        path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path

    return make


@needs_tuetoken
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_borders_are_those_of_the_reference(
    kind: str, json_of: Callable[[str], Path], tmp_path: Path
) -> None:
    path = json_of(kind)
    number, num_texts = find_form("tuetoken", str(path), tmp_path)
    assert num_texts > 4000
    assert (number > 0) == (kind == "llama2 extended form")
    form = str(write_form("tuetoken", str(path), number, tmp_path))
    assert (form != str(path)) == (number > 0)
    engine, reference = load_engine("tuetoken", str(path), form), load_engine("hf", str(path))
    generator = random.Random(1)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(texts, min_size=1, max_size=4), st.randoms())
    def check(given_texts: list[str], chance: random.Random) -> None:
        wanted = list(reference.encode(given_texts))
        assert [list(ids) for ids in engine.encode(given_texts)] == wanted
        positions = [chance.randint(1, max(1, len(text))) for text in given_texts]
        found = [(list(ids), border) for ids, border in engine.encode_with_borders(given_texts, positions)]
        assert found == list(reference.encode_with_borders(given_texts, positions))

    check()
    plain = [text for text in sample_texts(200, seed=9) if text]
    positions = [generator.randint(1, len(text)) for text in plain]
    assert isinstance(engine, CheckedEngine)
    engine.reference = NeverAsked()
    kept = [i for i, text in enumerate(plain) if not is_checked(text) and not engine.is_left_out(text)]
    assert len(kept) > 190 or kind == "llama2 with a word"
    found = list(engine.encode_with_borders([plain[i] for i in kept], [positions[i] for i in kept]))
    wanted = list(reference.encode_with_borders([plain[i] for i in kept], [positions[i] for i in kept]))
    assert [(list(ids), border) for ids, border in found] == wanted


@needs_tuetoken
def test_a_tokenizer_behind_special_tokens(json_of: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("llama2", "llama2 extended form"):
        path = tmp_path / "within.json"
        path.write_text(follow_special_tokens(json_of(kind).read_text(encoding="utf-8")), encoding="utf-8")
        number, _ = find_form("tuetoken", str(path), tmp_path)
        form = str(write_form("tuetoken", str(path), number, tmp_path))
        engine, reference = load_engine("tuetoken", str(path), form), load_engine("hf", str(path))
        given_texts = [a + b for a in PARTS for b in PARTS]
        assert [list(ids) for ids in engine.encode(given_texts)] == list(reference.encode(given_texts))


def test_what_a_text_must_hold_for_an_added_token() -> None:
    token = {"content": " a b▁", "special": False, "normalized": True}
    prepend = {"type": "Prepend", "prepend": "▁"}
    assert find_words({"added_tokens": [token], "normalizer": prepend}) == ["a"]
    assert find_words({"added_tokens": [{**token, "normalized": False}]}) == [" a b▁"]
    assert find_words({"added_tokens": [{**token, "special": True}]}) == []
    with pytest.raises(NotForThisTokenizer, match="in normalised text"):
        find_words({"added_tokens": [token], "normalizer": {"type": "NFC"}})
    with pytest.raises(NotForThisTokenizer, match="spaces"):
        find_words({"added_tokens": [{**token, "content": "▁ "}], "normalizer": prepend})


def test_a_trial_finds_an_engine_that_errs(
    json_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, "spaceless", f"{__name__}:SpacelessEngine")
    with pytest.raises(EngineDifference, match=r"spaceless and tokenizers differ \(token 0 is \d+"):
        find_form("spaceless", str(json_of("llama2")), tmp_path)
    monkeypatch.setitem(ENGINES, "refusing", f"{__name__}:refuse")
    with pytest.raises(NotForThisTokenizer, match="refusing can't read it: no such merges"):
        find_form("refusing", str(json_of("llama2")), tmp_path)


@needs_tuetoken
def test_a_trial_is_not_repeated(
    llama2_tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Not even in another output directory. A damaged record, or none that can be written, costs a trial."""
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    trials = []
    monkeypatch.setattr(engine_choice, "find_form", lambda *given: trials.append(given) or find_form(*given))
    data = write_records(tmp_path / "in", make_records("pretrain"))

    def number_of_trials(name: str) -> int:
        capfd.readouterr()
        trials.clear()
        run(PretrainSettings(), data, llama2_tokenizer_dir, tmp_path / name, "tuetoken")
        assert "(the ids of hf on" in "".join(capfd.readouterr())
        return len(trials)

    assert [number_of_trials(name) for name in ("a", "b")] == [1, 0]
    (record,) = (home / "colossal_llama" / "engine_trials").iterdir()
    passed = json.loads(record.read_text())
    for damaged in ('{"form": 77', json.dumps({**passed, "form": 77}), json.dumps({**passed, "sha256": "0"})):
        record.write_text(damaged)
        assert [number_of_trials(f"{name}{len(damaged)}") for name in ("a", "b")] == [1, 0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "data.jsonl"))
    assert number_of_trials("d") == 1


def refuse(tokenizer_json: str) -> Any:
    raise BaseException("no such merges")


def test_which_engine_is_tried(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert find_candidate("hf") == "hf"
    for version, auto in ((None, "hf"), ("0.0.1", "hf"), (TESTED_VERSIONS["tuetoken"][0], "tuetoken")):
        monkeypatch.setattr(engine_choice, "installed_version", lambda name, found=version: found)
        assert find_candidate("auto") == auto
        if version is None:
            with pytest.raises(UserError, match=r"pip install tuetoken==0\.1\.3"):
                find_candidate("tuetoken")
        else:
            assert find_candidate("tuetoken") == "tuetoken"
            assert ("is not tested" in capsys.readouterr().err) == (version == "0.0.1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engines of these tests pass is remembered for none of the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


def make_records(kind: str) -> list[dict[str, Any]]:
    found = sample_texts(240, seed=4)
    if kind == "pretrain":
        sources = ["" if i % 3 else f" {found[i][:40]}" for i in range(120)]
        records = [
            {"source": source, "target": found[i] + found[i + 120], "category": "c"}
            for i, source in enumerate(sources)
        ]
        odd = [a + b for a in PARTS for b in PARTS[:8]]
        return records + [{"source": text, "target": text, "category": "odd"} for text in odd]
    turns = [[found[i], found[i + 120], PARTS[i % len(PARTS)] + "?", found[i][:90]] for i in range(120)]
    roles = ("human", "assistant", "human", "assistant")
    return [
        {"messages": [{"from": r, "content": t} for r, t in zip(roles, four, strict=True)]} for four in turns
    ]


def run(
    records: PretrainSettings | SftSettings,
    data: Path,
    tokenizer_dir: Path,
    output: Path,
    engine: str,
    num_workers: int = 1,
) -> dict[str, bytes]:
    """Prepares; returns what a run writes beside its cache."""
    prepare(
        PreparationSettings(
            records,
            PathSettings([data], tokenizer_dir=tokenizer_dir, data_output_dirs=output),
            RowSettings(max_length=256, num_spliced_dataset_bins=3),
            WorkerSettings(num_workers, tokenizer_engine=engine),
        )
    )
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.relative_to(output).parts[0] != "cache" and path.name != ".lock"
    }


def write_records(directory: Path, records: list[dict[str, Any]]) -> Path:
    directory.mkdir()
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (directory / "data.jsonl").write_text(lines, encoding="utf-8")
    return directory


@needs_tuetoken
@pytest.mark.parametrize("kind", ["llama2", "llama3"])
def test_equal_bytes_over_engines_and_workers(
    kind: str,
    llama2_tokenizer_dir: Path,
    llama3_tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    tokenizer_dir = llama3_tokenizer_dir if kind == "llama3" else llama2_tokenizer_dir
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 20_000)
    version = 3 if kind == "llama3" else 2
    for name, records, count in (
        ("pretrain", PretrainSettings(), 2),
        ("colossal", SftSettings(llama_version=version), 2 if kind == "llama2" else 1),
        ("own", SftSettings(template=kind), 1),
    ):
        data = write_records(tmp_path / name, make_records(name))
        wanted = run(records, data, tokenizer_dir, tmp_path / f"{name}-hf", "hf")
        assert len(wanted) > 8
        for num_workers in (1, 2)[:count]:
            capfd.readouterr()
            output = tmp_path / f"{name}-{num_workers}"
            assert run(records, data, tokenizer_dir, output, "tuetoken", num_workers) == wanted
            out, err = capfd.readouterr()
            assert "Tokenizer engine: tuetoken 0.1.3 (the ids of hf on" in out + err


@pytest.mark.parametrize("num_workers", [1])
def test_a_wrong_id_on_a_late_text_stops_the_run(
    num_workers: int, llama2_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """File, line and text are named, nothing stays half-written, and what the engine encoded is not used."""
    monkeypatch.setitem(ENGINES, "poisoned", f"{__name__}:PoisonedEngine")
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 20_000)
    records = make_records("pretrain")
    poison = late_poison()
    records[-30] = {"source": "", "target": poison, "category": "c"}
    data = write_records(tmp_path / "in", records)
    monkeypatch.setattr(engine_choice, "SAMPLED_RECORDS", 2)
    output = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        run(PretrainSettings(), data, llama2_tokenizer_dir, output, "poisoned", num_workers)
    (problem,) = caught.value.problems
    place = f"{data / 'data.jsonl'}:{len(records) - 29}: poisoned and tokenizers differ (token "
    assert problem.startswith(place)
    assert repr(poison) in problem
    assert "Use --tokenizer_engine hf" in problem
    left = [path.name for path in output.rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith(".tmp") or name.startswith(("part-", "stats"))]
    cached = [name for name in left if name.endswith(".npz")]
    assert cached
    # The input is changed so that the text is gone: what was encoded before is not taken all the same.
    shards = output / "cache" / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.npz")}
    with pytest.raises(UserError):
        run(PretrainSettings(), data, llama2_tokenizer_dir, output, "poisoned", num_workers)
    after = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.npz")}
    assert all(after[name] != before[name] for name in after if name in before)
    wanted = run(PretrainSettings(), data, llama2_tokenizer_dir, tmp_path / "hf", "hf")
    assert run(PretrainSettings(), data, llama2_tokenizer_dir, output, "hf") == wanted
    assert not (shards / "other-ids.json").exists()


def test_a_wrong_id_in_the_sample_of_the_input(
    llama2_tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(ENGINES, "poisoned", f"{__name__}:PoisonedEngine")
    records = make_records("pretrain")
    records[3] = {"source": "", "target": POISON, "category": "c"}
    data = write_records(tmp_path / "in", records)
    wanted = run(PretrainSettings(), data, llama2_tokenizer_dir, tmp_path / "hf", "hf")
    capfd.readouterr()
    assert run(PretrainSettings(), data, llama2_tokenizer_dir, tmp_path / "out", "poisoned") == wanted
    out, err = capfd.readouterr()
    assert "poisoned is not used for this tokenizer, hf is" in out + err
    assert repr(POISON) in out + err


def test_ids_are_compared_whatever_holds_them() -> None:
    raise_difference("x", "t", np.array([1, 2]), [1, 2])
    with pytest.raises(EngineDifference, match="token 1 is none and 2"):
        raise_difference("x", "t", np.array([1]), [1, 2])


@pytest.mark.parametrize("engine", ["hf", pytest.param("tuetoken", marks=needs_tuetoken)])
def test_loading_an_engine_starts_no_thread(llama3_tokenizer_dir: Path, engine: str) -> None:
    """Workers are forked from the process that has loaded it."""
    code = (
        "import os, sys\n"
        "from colossal_llama.dataset.engines import load_engine\n"
        "load_engine(*sys.argv[1:])\n"
        "print(len(os.listdir('/proc/self/task')))\n"
    )
    path = llama3_tokenizer_dir / "tokenizer.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # numpy's threads can be forked
    command = [sys.executable, "-c", code, engine, str(path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


@pytest.mark.parametrize("kind", ["llama2", "llama3"])
@pytest.mark.parametrize("last", ["model", "normalizer", "vocab", "merges"])
def test_a_vocabulary_is_read_with_and_without_the_merges(
    llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path, kind: str, last: str
) -> None:
    """Whatever the order of the keys in the file, and whatever pieces look like."""
    directory = llama2_tokenizer_dir if kind == "llama2" else llama3_tokenizer_dir
    text = AutoTokenizer.from_pretrained(directory).backend_tokenizer.to_str()
    value = json.loads(text)
    value["model"]["vocab"]['"merges":'] = len(value["model"]["vocab"])
    value["model"]["merges"].append(['"mer', 'ges":'])
    for part in (value, value["model"]):
        if last in part:
            part[last] = part.pop(last)
    wanted = TokenBytes.of_value(value)
    assert wanted is not None
    for separators in ((",", ":"), (", ", ": ")):
        table, words = read_vocabulary(json.dumps(value, separators=separators).encode())
        assert table.contents == wanted.contents
        assert (table.prefix, table.added_ids) == (wanted.prefix, wanted.added_ids)
        assert words == find_words(value)


def test_plain_text_that_merges_turn_into_a_special_token(llama3_tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama3_tokenizer_dir)
    text = next(t for t in sorted(tokenizer.get_vocab()) if t.isascii() and t.isalpha() and len(t) > 2)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    token_id = tokenizer.convert_tokens_to_ids(text)
    data = write_records(tmp_path / "in", make_records("pretrain"))
    with pytest.raises(UserError, match=f"turn the plain text {text} into the special token {token_id}"):
        run(PretrainSettings(), data, tmp_path / "tokenizer", tmp_path / "out", "hf")
    assert not list((tmp_path / "out").rglob("part-*"))


def test_an_error_waits_for_the_fonts(
    llama3_tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon thread that is inside of matplotlib's C++ when Python ends makes exit code 2 an abort."""
    daemons = []
    monkeypatch.setattr(
        preparation, "prepare_to_draw", lambda: daemons.append(threading.current_thread().daemon)
    )
    data = write_records(tmp_path / "in", [{"messages": []}])
    with pytest.raises(UserError, match="1 bad records"):
        run(PretrainSettings(), data, llama3_tokenizer_dir, tmp_path / "out", "hf")
    assert daemons == [False]
