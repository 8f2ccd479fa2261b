"""What reaches the terminal, and the exit codes of a script."""

from __future__ import annotations

import errno

import pytest

from colossal_llama.utils.console import format_table, log, progress_bar, warn
from colossal_llama.utils.errors import UserError, run_command


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (
            UserError(["a.jsonl:7: no target", "--lr 0: too small"]),
            2,
            "error: a.jsonl:7: no target\nerror: --lr 0: too small\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "error: out: No space left on device\n"),
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
