"""Command-line parsing: all that is wrong is said at once, all that is right is taken as it is meant."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.training.arguments import build_parser as build_train_parser
from colossal_llama.utils.arguments import (
    FALSE_WORDS,
    TRUE_WORDS,
    ArgumentParser,
    directory_list,
    existing_directory,
    existing_file,
    number,
    parse_bool,
    positive_int,
)


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="script.py")
    parser.add_argument("--name", required=True, help="a name")
    parser.add_argument("--count", type=positive_int, default=3, help="how many")
    group = parser.add_argument_group("a group")
    group.add_argument("--ratio", "--fraction", type=number(float, 0, 1), default=0.5, help="a ratio")
    group.add_argument("--version", type=int, choices=(2, 3), default=3, help="a version")
    group.add_argument("--names", nargs="+", type=Path, help="several")
    parser.add_flag("--off", default=False, help="off by default", group=group)
    parser.add_flag("--on", default=True, help="on by default")
    parser.add_check(
        lambda args: ["--count and --ratio clash"] if args.count == 7 and args.ratio == 0 else []
    )
    return parser


def problems_of(parser: ArgumentParser, capsys: pytest.CaptureFixture, *words: str) -> list[str]:
    """The error lines for these arguments; there must be some, with exit code 2 and nothing on stdout."""
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return [line.removeprefix("error: ") for line in output.err.splitlines() if line.startswith("error: ")]


def test_all_problems_at_once(capsys: pytest.CaptureFixture) -> None:
    words = ["--count", "zero", "--ratio", "1.5", "--version", "4", "--off", "maybe", "--unknown", "1"]
    problems = problems_of(make_parser(), capsys, *words)
    assert problems == [
        "--count zero: is not a whole number",
        "--ratio 1.5: must be at most 1",
        "--version 4: choose from 2, 3",
        "--off maybe: use True or False",
        "unknown arguments: --unknown 1 (see --help)",
        "--name: required, but not given",
    ]


BAD_WORDS = {
    "count": st.sampled_from(["x", "1.5", "0", "-1", "", "1e3"]),
    "ratio": st.sampled_from(["x", "2", "-0.5", "nan", "inf", ""]),
    "version": st.sampled_from(["x", "1", "4"]),
    "off": st.sampled_from(["maybe", "2", "tru"]),
    "on": st.sampled_from(["maybe", "off"]),
}


@given(st.fixed_dictionaries({}, optional=BAD_WORDS))
def test_each_bad_value_is_named_once(bad: dict[str, str]) -> None:
    parser = make_parser()
    words = [f"--{name}={value}" for name, value in bad.items()]
    if not bad:
        assert parser.parse_args(["--name", "x"]).name == "x"
        return
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(words)
    assert caught.value.code == 2
    for name, value in bad.items():
        assert sum(problem.startswith(f"--{name} {value}: ") for problem in parser.problems) == 1
    assert len(parser.problems) == len(bad) + 1
    assert "--name: required, but not given" in parser.problems


@given(st.sampled_from(TRUE_WORDS + FALSE_WORDS), st.data())
def test_booleans_in_any_case(word: str, data: st.DataObject) -> None:
    cased = "".join(data.draw(st.sampled_from([c.lower(), c.upper()])) for c in word)
    expected = word in TRUE_WORDS
    assert parse_bool(f" {cased} ") is expected
    assert make_parser().parse_args(["--name", "x", "--off", cased]).off is expected
    assert make_parser().parse_args(["--name", "x", f"--on={cased}"]).on is expected
    assert make_parser().parse_args(["--name", "x", "--no-on", cased]).on is not expected


@given(st.text())
def test_other_words_are_not_booleans(text: str) -> None:
    if text.strip().lower() in TRUE_WORDS + FALSE_WORDS:
        return
    with pytest.raises(ValueError, match="use True or False"):
        parse_bool(text)


def test_flags_without_a_value() -> None:
    parse = make_parser().parse_args
    assert parse(["--name", "x"]).off is False
    assert parse(["--name", "x", "--off"]).off is True
    assert parse(["--off", "--name", "x"]).name == "x"
    assert parse(["--name", "x"]).on is True
    assert parse(["--name", "x", "--no-on"]).on is False
    assert parse(["--name", "x", "--no-on", "--on"]).on is True


def test_aliases_set_the_same_value() -> None:
    parse = make_parser().parse_args
    assert parse(["--name", "x", "--fraction", "0.25"]).ratio == 0.25
    assert parse(["--name", "x", "--ratio", "0.25"]).ratio == 0.25


def test_no_abbreviations(capsys: pytest.CaptureFixture) -> None:
    assert problems_of(make_parser(), capsys, "--name", "x", "--cou", "4") == [
        "unknown arguments: --cou 4 (see --help)"
    ]


def test_checks_run_only_on_valid_values(capsys: pytest.CaptureFixture) -> None:
    parser = make_parser()
    assert problems_of(parser, capsys, "--name=x", "--count=7", "--ratio=0") == ["--count and --ratio clash"]
    assert problems_of(parser, capsys, "--name=x", "--count=7", "--ratio=0", "--version=9") == [
        "--version 9: choose from 2, 3"
    ]
    assert parser.parse_args(["--name=x", "--count=7"]).count == 7


def test_only_rank_0_complains(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert problems_of(make_parser(), capsys) == []
    monkeypatch.setenv("RANK", "0")
    assert problems_of(make_parser(), capsys) == ["--name: required, but not given"]


def test_a_flag_without_its_value_joins_the_other_problems(capsys: pytest.CaptureFixture) -> None:
    problems = problems_of(make_parser(), capsys, "--version", "9", "--name")
    assert problems[0] == "--version 9: choose from 2, 3"
    assert "--name" in problems[-1]


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_number_ranges(value: int, low: int, high: int) -> None:
    convert = number(int, minimum=low, maximum=high)
    if low <= value <= high:
        assert convert(str(value)) == value
    else:
        with pytest.raises(ValueError, match="must be at"):
            convert(str(value))
    if value > low:
        assert number(float, above=low)(str(value)) == value
    else:
        with pytest.raises(ValueError, match="must be above"):
            number(float, above=low)(str(value))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_their_value(value: float) -> None:
    assert math.isclose(number(float)(repr(value)), value, rel_tol=0)


def test_help_states_defaults(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "how many (default: 3)" in text
    assert "{2,3}" in text
    assert "off by default" in text
    assert "off by default (default" not in text


def test_paths(tmp_path: Path) -> None:
    directory, file = tmp_path / "a directory", tmp_path / "file"
    directory.mkdir()
    file.write_text("")
    assert existing_directory(str(directory)) == directory
    assert existing_file(str(file)) == file
    assert directory_list(f"{directory}, {tmp_path},") == [directory, tmp_path]
    for convert, text, complaint in (
        (existing_directory, file, "is not a directory"),
        (existing_directory, tmp_path / "none", "no such directory"),
        (existing_file, directory, "is not a file"),
        (existing_file, tmp_path / "none", "no such file"),
        (directory_list, " , ", "give at least one directory"),
    ):
        with pytest.raises(ValueError, match=complaint):
            convert(str(text))
    with pytest.raises(ValueError, match=r"none: no such directory; .*file: is not a directory"):
        directory_list(f"{directory},{tmp_path / 'none'},{file}")


TRAIN_ALIASES = [
    ("--grad_clip", "--gradient_clipping", "0.5"),
    ("--zero_stage", "--zero", "2"),
    ("--batch_size", "--micro_batch_size", "4"),
]


@pytest.mark.parametrize(("name", "alias", "value"), TRAIN_ALIASES)
def test_train_accepts_both_names(name: str, alias: str, value: str) -> None:
    def parse(flag: str) -> argparse.Namespace:
        words = ["--pretrained", "model", "--benchmark", "--plugin", "3d", flag, value]
        return build_train_parser().parse_args(words)

    assert parse(name) == parse(alias)
    assert parse(name) != build_train_parser().parse_args(
        ["--pretrained", "model", "--benchmark", "--plugin", "3d"]
    )
