"""Reading input: every line once, whatever the shards, and numbers that lead to the right line."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.corpus import jsonl
from colossal_llama.corpus.jsonl import Shard
from colossal_llama.corpus.records import parse_object
from colossal_llama.utils.errors import UserError

zstandard = pytest.importorskip("zstandard")


def shards_of(path: Path, step: int) -> list[Shard]:
    stat = path.stat()
    return [
        Shard(str(path), 0, start, min(start + step, stat.st_size), stat.st_size, stat.st_mtime_ns)
        for start in range(0, stat.st_size, step)
    ]


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b" "))), st.integers(1, 30), st.booleans()
)
def test_every_line_once_in_order(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], step: int, final_newline: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / f"lines-{os.getpid()}.jsonl"
    content = b"\n".join(lines) + (b"\n" if final_newline else b"")
    path.write_bytes(content)
    read = [line for shard in shards_of(path, step) for line in jsonl.read_lines(shard)]
    assert b"".join(read) == content.removeprefix(jsonl.UTF8_BOM)
    assert all(line.count(b"\n") <= 1 for line in read)


def test_shards_depend_on_the_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 100)
    (tmp_path / "b.jsonl").write_bytes(b"x" * 250)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(os.urandom(500)))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("no input")
    files = jsonl.find_input_files([tmp_path])
    assert [path.name for path in files[0]] == ["a.jsonl.gz", "b.jsonl", "empty.jsonl"]
    shards = jsonl.make_shards(files)
    assert [(Path(s.path).name, s.start) for s in shards] == [
        ("a.jsonl.gz", 0),
        ("b.jsonl", 0),
        ("b.jsonl", 100),
        ("b.jsonl", 200),
        ("empty.jsonl", 0),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_compressed_files_and_byte_order_mark(tmp_path: Path, suffix: str) -> None:
    content = jsonl.UTF8_BOM + b'{"a": 1}\r\n\r\n' + b'{"a": "' + b"x" * 3_000_000 + b'"}'
    zstd = zstandard.ZstdCompressor()
    packed = {
        ".jsonl": content,
        ".jsonl.gz": gzip.compress(content[:5]) + gzip.compress(content[5:]),
        ".jsonl.zst": zstd.compress(content[:5]) + zstd.compress(content[5:]),
    }
    (tmp_path / f"x{suffix}").write_bytes(packed[suffix])
    shards = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    lines = [line for shard in shards for line in jsonl.read_lines(shard)]
    assert b"".join(lines) == content[3:]
    assert parse_object(lines[0]) == {"a": 1}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_compressed_files_are_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    content = b"".join(b'{"n": %d}\n' % n for n in range(50_000))
    packed = gzip.compress(content) if suffix.endswith("gz") else zstandard.ZstdCompressor().compress(content)
    packed = {"cut": packed[: len(packed) // 2], "garbage": b"garbage" + packed, "empty": b""}[damage]
    (tmp_path / f"x{suffix}").write_bytes(packed)
    (shard,) = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    with pytest.raises(UserError, match=r"x\.jsonl\.\w+: damaged file"):
        list(jsonl.read_lines(shard))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"1\n2\n")
    (shard,) = jsonl.make_shards(jsonl.find_input_files([tmp_path]))
    path.write_bytes(b"1\n2\n3\n")
    with pytest.raises(UserError, match=r"x\.jsonl: changed"):
        list(jsonl.read_lines(shard))


def test_directories_without_input_and_given_twice(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        jsonl.find_input_files([tmp_path / "empty", tmp_path / "empty"])
    assert len(caught.value.problems) == 3
    assert "holds no *.jsonl" in caught.value.problems[0]
    assert "given twice" in caught.value.problems[1]


def test_records_left_out_or_counted_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    for name in ("b.json", "c.JSONL", "d.jsonl.xz", "notes.txt", ".e.jsonl.swp"):
        (tmp_path / name).touch()
    (tmp_path / "f.jsonl").mkdir()
    assert [file.name for file in jsonl.find_input_files([tmp_path])[0]] == ["a.jsonl"]
    assert f"{tmp_path}: b.json, c.JSONL, d.jsonl.xz, f.jsonl not read" in capsys.readouterr().err
    (tmp_path / "a.jsonl.gz").touch()
    (tmp_path / "g.jsonl").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        jsonl.find_input_files([tmp_path])
    assert len(caught.value.problems) == 2
    assert "both a.jsonl and a.jsonl.gz" in caught.value.problems[0]
    assert f"{tmp_path}/g.jsonl: a link to nowhere, which is not there" in caught.value.problems[1]


def write_tree(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"{}\n")


def test_a_directory_below_that_holds_input(tmp_path: Path) -> None:
    write_tree(tmp_path, "a.jsonl", "zh/deep/b.jsonl.gz", "zz.jsonl/c.jsonl", "docs/readme.txt")
    for recursive, remedy in ((None, "of its own$"), (False, "of its own, or use --recursive$")):
        message = (
            rf"{tmp_path}: the directory zh/ in it holds input \(zh/deep/b\.jsonl\.gz\) .*1 more.*{remedy}"
        )
        with pytest.raises(UserError, match=message):
            jsonl.find_input_files([tmp_path], recursive)


def test_input_below_is_read_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the paths; nothing twice, and everything else by name."""
    write_tree(tmp_path, "in/b.jsonl", "in/a/z.jsonl", "in/a/c/y.jsonl", "in/a-b.jsonl", "in/a/c/n.txt")
    write_tree(tmp_path, "in/.git/x.jsonl", "in/own/w.jsonl", "elsewhere/v.jsonl", "in/p.csv")
    write_tree(tmp_path, "in/out/jsonl/part-00000.jsonl", "in/out/stats.json")
    (tmp_path / "in" / "e").mkdir()
    (tmp_path / "in" / "empty.jsonl").touch()
    os.mkfifo(tmp_path / "in" / "pipe.jsonl")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    (tmp_path / "in" / "l1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "l2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in" / "a")
    found = jsonl.find_input_files([tmp_path / "in", tmp_path / "in" / "own"], True)
    names = [[str(Path(file.path).relative_to(tmp_path / "in")) for file in files] for files in found]
    assert names == [
        ["a-b.jsonl", "a/c/y.jsonl", "a/z.jsonl", "b.jsonl", "empty.jsonl", "l1/v.jsonl"],
        ["own/w.jsonl"],
    ]
    out, err = capsys.readouterr()
    assert "p.csv not read" in err
    for named in (
        ".git/ (hidden)",
        "a/c/n.txt (not *.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet)",
        "a/loop/ (the same directory as a/)",
        "e/, empty.jsonl (empty)",
        "gone (a link to nowhere, which is not there)",
        "l2/ (the same directory as l1/)",
        "out/ (output of a prepare script)",
        "pipe.jsonl (not a regular file)",
        "own/ (given as a directory of its own)",
    ):
        assert named in out
    # Without the flag only what is not named as left out is an error.
    for name in ("a", "l1", "l2"):
        path = tmp_path / "in" / name
        path.unlink() if path.is_symlink() else shutil.rmtree(path)
    found = jsonl.find_input_files([tmp_path / "in", tmp_path / "in" / "own"], False)
    assert [len(files) for files in found] == [3, 1]


def test_packed_and_unpacked_below(tmp_path: Path) -> None:
    write_tree(tmp_path, "a/x.jsonl", "b/x.jsonl.gz", "b/y.jsonl", "b/y.jsonl.gz")
    with pytest.raises(UserError) as caught:
        jsonl.find_input_files([tmp_path], True)
    (problem,) = caught.value.problems
    assert "both b/y.jsonl and b/y.jsonl.gz" in problem


def test_zst_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.jsonl.zst").touch()
    monkeypatch.setattr(jsonl, "_import_zstandard", lambda: None)
    with pytest.raises(UserError, match="pip install zstandard"):
        jsonl.find_input_files([tmp_path])
