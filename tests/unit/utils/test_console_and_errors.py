"""What reaches the terminal, and the exit codes of a script."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from colossal_llama.utils.console import PlainProgress, format_table, log, progress_bar, warn
from colossal_llama.utils.errors import UserError, run_command


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            UserError(["a.jsonl:7: no target", "--lr 0: too small"]),
            2,
            "error: a.jsonl:7: no target\nerror: --lr 0: too small\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out"),
            2,
            "error: out: No space left on device; free some space or choose another directory, "
            "then run the same command again\n",
        ),
        (OSError(errno.EIO, "Input/output error", "a", None, "b"), 2, "error: b: Input/output error\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_mistakes_become_exit_codes(
    capsys: pytest.CaptureFixture, raised: BaseException, code: int, text: str
) -> None:
    def main() -> None:
        raise raised

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_scripts_own_code(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: returned)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("stdout", "written"), [("", b"a\xfc\\u4eba\\ud800\n"), (" >&-", b"")], ids=["latin-1", "closed"]
)
def test_any_standard_output_will_do(stdout: str, written: bytes) -> None:
    code = (
        "from colossal_llama.utils import console, errors;"
        "errors.run_command(lambda: console.log('a\\xfc\\u4eba\\ud800'))"
    )
    result = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}"{stdout}'],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, written, b"")


def test_a_reader_that_goes_away_does_not_end_the_work() -> None:
    code = (
        "import time; from colossal_llama.utils import console, errors\n"
        "def main():\n"
        "    time.sleep(0.5)\n"
        "    for write in (console.log, console.warn):\n"
        "        write('a'); write('b')\n"
        "    console.PlainProgress(total=1)._write_line(1.0)\n"
        "    return 7\n"
        "errors.run_command(main)"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 7


def test_faults_of_the_program_keep_their_traceback() -> None:
    def main() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run_command(main)


def test_only_rank_0_speaks(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(this_rank_only: bool) -> None:
        with pytest.raises(SystemExit) as caught:
            run_command(lambda: (_ for _ in ()).throw(UserError("a problem", this_rank_only)))
        assert caught.value.code == 2

    monkeypatch.setenv("RANK", "1")
    log("a line")
    warn("a warning")
    fail(this_rank_only=False)
    assert list(progress_bar(range(3))) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    fail(this_rank_only=True)
    assert capsys.readouterr().err == "error: a problem\n"
    monkeypatch.setenv("RANK", "0")
    log("a line")
    warn("a warning")
    assert capsys.readouterr() == ("a line\n", "warning: a warning\n")


def test_tables_line_up_with_wide_characters() -> None:
    table = format_table(
        ["name", "count", "rate", "tied"], [["人工", 1234567, 0.5, True], ["ab", 1, 12.0, False]]
    )
    assert table.splitlines() == [
        "name      count    rate  tied",
        "----  ---------  ------  ----",
        "人工  1,234,567   0.500   yes",
        "ab            1  12.000    no",
    ]


WORK = """
from colossal_llama.utils import console
bar = console.progress_bar(total=4, desc="train", unit="step", initial=1)
for step in range(3):
    bar.update()
    console.log(f"step {step}")
bar.close()
for _ in console.progress_bar(range(3), desc="evaluate", leave=False):
    pass
"""


def test_progress_is_drawn_at_a_terminal_and_not_in_a_file(root, tmp_path) -> None:
    """At a terminal one line is redrawn; where output goes to a file there are whole lines, or none."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    words = [sys.executable, "-c", WORK]
    subprocess.run(words, stdout=terminal, stderr=terminal, env=environment, check=True)
    os.close(terminal)
    drawn = os.read(controller, 1 << 16).decode()
    os.close(controller)
    assert "train: 100%|" in drawn
    assert drawn.count("\r") > 4
    piped = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    assert (piped.stdout, piped.stderr) == ("step 0\nstep 1\nstep 2\n", "")
    other_rank = subprocess.run(
        words, capture_output=True, text=True, env={**environment, "RANK": "1"}, check=True
    )
    assert (other_rank.stdout, other_rank.stderr) == ("", "")


def test_plain_progress_writes_whole_lines(capsys: pytest.CaptureFixture) -> None:
    bar = PlainProgress(total=400, desc="train", unit="step", initial=100, seconds_between_lines=0)
    bar.started -= 110
    bar.set_postfix(loss="5.1", lr="1e-4")
    for _ in range(3):
        bar.update(50)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train: 150/400 steps (38 %), 2.2 s each, 0:09:10 left, loss=5.1, lr=1e-4",
        "train: 200/400 steps (50 %), 1.1 s each, 0:03:40 left, loss=5.1, lr=1e-4",
        "train: 250/400 steps (62 %), 1.4 steps/s, 0:01:50 left, loss=5.1, lr=1e-4",
    ]
    assert list(PlainProgress(iter("abc"), desc="reading", unit=" records", seconds_between_lines=0)) == [
        *"abc"
    ]
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r", .*", "", line) for line in lines] == [f"reading: {n} records" for n in (1, 2, 3)]
    with PlainProgress(total=3e9, desc="weights", unit="B", unit_scale=True, seconds_between_lines=0) as bar:
        bar.started -= 10
        bar.update(1.5e9)
    assert capsys.readouterr().err == "weights: 1.5G/3G B (50 %), 150M B/s, 0:00:10 left\n"


def test_the_last_state_is_written_if_any_was(capsys: pytest.CaptureFixture) -> None:
    for leave, expected in ((True, ["1", "3"]), (False, ["1"])):
        bar = PlainProgress(desc="x", seconds_between_lines=0, leave=leave)
        bar.update()
        bar.seconds_between_lines = 1000
        bar.update(2)
        bar.close()
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[1] for line in lines] == expected
