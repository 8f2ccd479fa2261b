"""Atomic writes, JSON errors that name the place, and locks on directories."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import (
    aside_path,
    lock_holder,
    locked_directory,
    read_json,
    read_json_object,
    remove_name,
    replace_path,
    wait_for_file,
    with_filename_in_errors,
    write_json,
    write_text_atomically,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_json_survives_a_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # lone surrogates
        return
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_chinese_stays_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"piece": "人工智能"})
    assert "人工智能" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_parents_are_made_and_nothing_is_left_aside(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a" / "b" / "text", "new")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["text"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text"
    write_text_atomically(path, "old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        write_text_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError("1000 requested and 10 written")]
)
def test_errors_of_writing_name_the_file(error: OSError) -> None:
    with pytest.raises(OSError, match="No space left") as caught, with_filename_in_errors("a/b"):
        raise error
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker
    assert (again.errno, again.filename) == (28, "a/b")
    with pytest.raises(FileNotFoundError) as named, with_filename_in_errors("a/b"):
        open("/nowhere/file")  # noqa: SIM115
    assert named.value.filename == "/nowhere/file"


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "text"
    texts = {"a" * 1_000_000, "b" * 1_000_000}
    write_text_atomically(path, "a" * 1_000_000)
    program = (
        "import sys; from pathlib import Path; from colossal_llama.utils.files import write_text_atomically\n"
        "print('ready', flush=True)\n"
        "while True:\n    for c in 'ab': write_text_atomically(Path(sys.argv[1]), c * 1_000_000)"
    )
    for delay in (0.0, 0.01, 0.03, 0.05, 0.07):
        process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert path.read_text() in texts


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{\n  "a": 1,\n  b\n}', ":3: not valid JSON"),
        (b"\xff\xfe", "not UTF-8 text"),
        (None, "no such file"),
    ],
)
def test_bad_json_names_the_place(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_json(path)
    assert str(path) in caught.value.problems[0]


HOLD_LOCK = (
    "import sys, time; from pathlib import Path; from colossal_llama.utils.files import locked_directory\n"
    "with locked_directory(Path(sys.argv[1]), 'a test'):\n    print('locked', flush=True); time.sleep(60)"
)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    directory = tmp_path / "made by the lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, directory], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(
                UserError, match=rf"in use by process {holder.pid} on .*training needs a directory"
            ),
            locked_directory(directory, "training"),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with locked_directory(directory, "training"):
        assert f"process {os.getpid()} " in (directory / ".lock").read_text()


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with locked_directory(tmp_path, "a test"):
            pass
    with pytest.raises(RuntimeError), locked_directory(tmp_path, "a test"):
        raise RuntimeError
    with locked_directory(tmp_path, "a test"):
        pass


def test_a_file_that_comes_into_sight_later(tmp_path: Path) -> None:
    path = tmp_path / "late"
    timer = threading.Timer(0.3, path.touch)
    timer.start()
    assert wait_for_file(path, seconds=20) == path
    timer.join()
    with pytest.raises(FileNotFoundError, match="never"):
        wait_for_file(tmp_path / "gone" / "never", seconds=0.2)


def test_replacing_a_directory_by_several_at_once(tmp_path: Path) -> None:
    """Whoever comes last stays, whole; nobody fails and nothing else is left."""
    final = tmp_path / "part"
    barrier = threading.Barrier(8)
    failures = []

    def replace(number: int) -> None:
        for turn in range(20):
            aside = aside_path(final)
            aside.mkdir()
            for name in "ab":
                (aside / name).write_text(f"{number} {turn}")
            barrier.wait(30)
            try:
                replace_path(aside, final)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=replace, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == ["part"]
    assert (final / "a").read_text() == (final / "b").read_text()


def test_of_what_lies_behind_a_link_the_link_is_removed(tmp_path: Path) -> None:
    theirs, directory = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    (theirs / "file").touch()
    directory.mkdir()
    (directory / "link").symlink_to(theirs)
    (directory / "file").symlink_to(theirs / "file")
    for name in ("link/file", "file", "nothing", "nothing/below"):
        remove_name(directory, name)
    assert list(directory.iterdir()) == []
    assert (theirs / "file").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[]", r": not a JSON object but an array"),
        (b"null", r": not a JSON object but null"),
        (b"7", r": not a JSON object but a number"),
        (b"9" * 5000, r": not valid JSON \(a number too long"),
        (b"[" * 100_000, r": not valid JSON \("),
    ],
)
def test_what_is_no_object_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_json_object(path)
    assert str(path) in caught.value.problems[0]


def test_a_byte_order_mark_before_json_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == read_json_object(tmp_path / "a.json") == {"a": 1}


def test_the_holder_of_a_lock(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / "none") is None
    with locked_directory(tmp_path, "a test"):
        assert f"process {os.getpid()} on " in lock_holder(tmp_path)
    assert lock_holder(tmp_path) is None
