"""Input behind URLs: the same shards and lines as from a directory, and what can go wrong on the way."""

from __future__ import annotations

import gzip
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from colossal_llama.corpus import jsonl, storage
from colossal_llama.corpus.storage import InputFile, list_input, open_range, stat_file
from colossal_llama.utils.errors import UserError

LINES = [b'{"n": %d, "text": "%s"}\n' % (n, b"x" * (n * 37 % 5000)) for n in range(300)]


@pytest.fixture
def memory_url() -> Iterator[str]:
    """Two files, one of them compressed, and others that are no input."""
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/corpus/b.jsonl", jsonl.UTF8_BOM + b"".join(LINES))
    filesystem.pipe("/corpus/a.jsonl.gz", gzip.compress(b"".join(LINES)))
    filesystem.pipe("/corpus/notes.txt", b"no input")
    filesystem.pipe("/corpus/below/c.txt", b"not read")
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, as object stores do and Python's own server does not."""

    serves_ranges = True
    requests: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        if wanted is None or not self.serves_ranges or os.path.isdir(self.translate_path(self.path)):
            super().do_GET()
            return
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = wanted.removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[tuple[Path, str, type[RangeServer]]]:
    """(directory, its URL, the handler's class)."""
    handler = type("Handler", (RangeServer,), {"requests": []})
    directory = tmp_path / "web"
    directory.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=directory)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()
        thread.join()


def test_files_behind_a_url(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 10_000)
    files = jsonl.find_input_files([memory_url])
    assert [file.name for file in files[0]] == ["a.jsonl.gz", "b.jsonl"]
    shards = jsonl.make_shards(files)
    assert len(shards) > 20
    for file in files[0]:
        lines = [line for s in shards if s.path == file.path for line in jsonl.read_lines(s)]
        assert lines == LINES
        assert file == stat_file(file.path)


def test_directories_below_a_url(memory_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl.find_input_files([memory_url])
    assert (
        "corpus: left out: below/ (no input file in it); notes.txt (not *.jsonl," in capsys.readouterr().out
    )
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/corpus/below/deep/d.jsonl", b"{}\n")
    filesystem.pipe("/corpus/below/e.jsonl", b"")
    message = r"memory://corpus: the directory below/ in it holds input \(below/deep/d\.jsonl\)"
    with pytest.raises(UserError, match=message):
        jsonl.find_input_files([memory_url], False)
    (files,) = jsonl.find_input_files([memory_url], True)
    assert [file.path.partition("corpus/")[2] for file in files] == [
        "a.jsonl.gz",
        "b.jsonl",
        "below/deep/d.jsonl",
        "below/e.jsonl",
    ]
    out = capsys.readouterr().out
    assert (
        "left out: below/c.txt, notes.txt (not *.jsonl, *.jsonl.gz, *.jsonl.zst, *.parquet); "
        "below/e.jsonl (empty)" in out
    )
    both = jsonl.find_input_files([memory_url, f"{memory_url}/below/"], True)
    assert [len(files) for files in both] == [2, 2]


def test_directories_below_a_page(web_server: tuple[Path, str, type[RangeServer]]) -> None:
    directory, url, _ = web_server
    (directory / "below").mkdir()
    (directory / "below" / "x.jsonl").write_bytes(b"{}\n")
    with pytest.raises(UserError, match=r"the directory below/ in it holds input \(below/x\.jsonl\)"):
        jsonl.find_input_files([url], False)
    (files,) = jsonl.find_input_files([url], True)
    assert [file.path for file in files] == [f"{url}/below/x.jsonl"]


def test_a_remote_file_that_changes(memory_url: str) -> None:
    shard = jsonl.make_shards(jsonl.find_input_files([memory_url]))[-1]
    fsspec.filesystem("memory").pipe("/corpus/b.jsonl", b"x" * shard.size)
    with pytest.raises(UserError, match=r"memory://\S*/b\.jsonl: changed while it was read"):
        list(jsonl.read_lines(shard))


def test_little_more_is_fetched_than_asked_for(
    web_server: tuple[Path, str, type[RangeServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, url, handler = web_server
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 250_000)
    monkeypatch.setattr(storage, "TAIL_BYTES", 8_000)
    (directory / "x.jsonl").write_bytes(b"".join(LINES))
    shards = jsonl.make_shards(jsonl.find_input_files([url]))
    assert len(shards) > 2
    handler.requests.clear()
    assert [line for shard in shards for line in jsonl.read_lines(shard)] == LINES
    ranges = [wanted for path, wanted in handler.requests if path == "/x.jsonl"]
    assert None not in ranges
    assert len(ranges) == len(shards)  # one request each: no line is longer than the tail
    fetched = sum(
        1 - int(first) + int(last) for first, last in (r.removeprefix("bytes=").split("-") for r in ranges)
    )
    assert fetched < shards[0].size + 8_001 * len(shards)


def test_a_line_far_longer_than_its_shard(
    web_server: tuple[Path, str, type[RangeServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, url, handler = web_server
    monkeypatch.setattr(storage, "FETCH_BYTES", 300_000)
    line = b"y" * 3_000_000
    (directory / "x.jsonl").write_bytes(line + b"\nz\n")
    with open_range(f"{url}/x.jsonl", len(line) + 3, end=1000) as file:
        assert file.readline() == line + b"\n"
        assert file.readline() == b"z\n"
        file.seek(2_999_999)
        assert file.readline() == b"y\n"
    assert len(handler.requests) < 25


def test_a_server_without_byte_ranges(web_server: tuple[Path, str, type[RangeServer]]) -> None:
    directory, url, handler = web_server
    handler.serves_ranges = False
    (directory / "x.jsonl").write_bytes(b"".join(LINES))
    with (
        pytest.raises(UserError, match="does not serve byte ranges"),
        open_range(f"{url}/x.jsonl", len(b"".join(LINES)), end=1000) as file,
    ):
        file.read(1)


def test_a_server_that_stops_answering(
    web_server: tuple[Path, str, type[RangeServer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, url, _ = web_server
    (directory / "x.jsonl").write_bytes(b"".join(LINES))
    size = list_input(url, (".jsonl",)).files["x.jsonl"].size
    attempts = []
    monkeypatch.setattr("time.sleep", attempts.append)
    elsewhere = "http://127.0.0.1:1/x.jsonl"
    with (
        pytest.raises(UserError, match=rf"{elsewhere}: can't be read: \w+.*goes on where"),
        open_range(elsewhere, size, end=1000) as file,
    ):
        file.read(1)
    assert attempts == [1, 4]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere", r"memory://nowhere: no such file or directory"),
        ("memory://corpus/b.jsonl", r"is a file; give the URL of its directory"),
        ("memory://corpus/below/..", r"holds no \*\.jsonl|no such file"),
        ("gs://bucket/corpus", r"gs://bucket/corpus: reading gs:// needs a library: pip install gcsfs"),
        ("nonsense://x", r"nonsense://x: .*nonsense"),
        ("http://127.0.0.1:1/", r"http://127\.0\.0\.1:1/: can't be read: \w+"),
    ],
)
def test_urls_that_can_not_be_read(
    memory_url: str, monkeypatch: pytest.MonkeyPatch, url: str, message: str
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match=f"--data_input_dirs .*{message}"):
        jsonl.find_input_files([url])


def test_a_url_given_twice(memory_url: str) -> None:
    with pytest.raises(UserError, match="given twice"):
        jsonl.find_input_files([memory_url, memory_url + "/"])


def test_links_are_read_by_their_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded data sets are often links to files without a suffix."""
    monkeypatch.setattr(jsonl, "MIN_SHARD_BYTES", 10_000)
    (tmp_path / "in").mkdir()
    (tmp_path / "blob").write_bytes(b"".join(LINES))
    (tmp_path / "in" / "x.jsonl").symlink_to(tmp_path / "blob")
    shards = jsonl.make_shards(jsonl.find_input_files([tmp_path / "in"]))
    assert len(shards) > 20
    assert [line for shard in shards for line in jsonl.read_lines(shard)] == LINES


def test_local_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"abc")
    (file,) = list_input(tmp_path, (".jsonl",)).files.values()
    assert file == InputFile(str(tmp_path / "x.jsonl"), 3, (tmp_path / "x.jsonl").stat().st_mtime_ns)
    with pytest.raises(UserError, match=r"y\.jsonl: no such file"):
        stat_file(str(tmp_path / "y.jsonl"))
