"""Settings classes: each field is a flag, and what was parsed becomes an object."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.utils.arguments import ArgumentParser, non_negative_int, number
from colossal_llama.utils.settings import OnResume, add_settings, as_json, flag, flags_of, read_settings


@dataclass(frozen=True)
class InputSettings:
    model: str = flag(None, "the model", required=True)
    files: list[Path] | None = flag(None, "data", type=Path, nargs="+", on_resume=OnResume.FREE)
    texts: list[str] | None = flag(None, "a text", repeatable=True)


@dataclass(frozen=True)
class StepSettings:
    lr: float = flag(3e-4, "peak learning rate", type=number(float, minimum=0))
    clip: float = flag(1.0, "largest norm", type=float, also=("--gradient_clipping",))
    warmup: int | None = flag(None, "steps", type=non_negative_int, unset_means=0)
    mode: str = flag("fast", "how", choices=("fast", "exact"))
    shuffles: bool = flag(True, "mix the rows")
    saves: bool = flag(False, "keep the weights")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="made_up.py")
    add_settings(parser, InputSettings, "inputs")
    add_settings(parser, StepSettings, "steps")
    return parser


def read(words: str = "") -> tuple[InputSettings, StepSettings]:
    parsed = make_parser().parse_args(["--model", "m", *words.split()])
    return read_settings(InputSettings, parsed), read_settings(StepSettings, parsed)


def test_defaults_are_those_of_the_class() -> None:
    assert read() == (InputSettings(model="m"), StepSettings())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lr 1", {"lr": 1.0}),
        ("--clip 2", {"clip": 2.0}),
        ("--gradient_clipping 2", {"clip": 2.0}),
        ("--warmup 3", {"warmup": 3}),
        ("--mode exact", {"mode": "exact"}),
        ("--no-shuffles --saves", {"shuffles": False, "saves": True}),
        ("--shuffles False --saves True", {"shuffles": False, "saves": True}),
    ],
)
def test_values_are_those_of_the_command_line(words: str, expected: dict) -> None:
    assert read(words)[1] == StepSettings(**expected)


def test_lists() -> None:
    inputs, _ = read("--files a b --texts one --texts two")
    assert inputs == InputSettings("m", [Path("a"), Path("b")], ["one", "two"])


def test_every_problem_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(["--lr", "-1", "--warmup", "x", "--mode", "slow", "--saves", "perhaps"])
    assert caught.value.code == 2
    *problems, _ = capsys.readouterr().err.splitlines()
    assert problems == [
        "error: --lr -1: must be at least 0",
        "error: --warmup x: is not a whole number",
        "error: --mode slow: choose from fast, exact",
        "error: --saves perhaps: use True or False",
        "error: --model: required, but not given",
    ]


def test_the_help_page_has_a_group_for_each_class(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    page = capsys.readouterr().out
    places = [page.index(text) for text in ("\ninputs:\n", "\n  --model", "\nsteps:\n", "\n  --lr LR")]
    assert places == sorted(places)
    assert "peak learning rate (default: 0.0003)" in page
    assert "--clip CLIP, --gradient_clipping" in page


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        read()[1].lr = 1.0


def test_flags_are_known_as_they_were_declared() -> None:
    flags = flags_of(read())
    names = [each.name for part in (InputSettings, StepSettings) for each in dataclasses.fields(part)]
    assert list(flags) == names
    assert (flags["files"].on_resume, flags["lr"].on_resume) == (OnResume.FREE, OnResume.FIXED)
    assert flags["lr"].default == 3e-4
    assert (flags["warmup"].meaning(None), flags["warmup"].meaning(5)) == (0, 5)
    assert flags["lr"].meaning(0.0) == 0.0


@given(st.lists(st.text(min_size=1).map(Path), min_size=1), st.floats(0, 1))
def test_values_for_a_record_are_sorted_and_plain(paths: list[Path], lr: float) -> None:
    values = as_json((InputSettings("m", paths), StepSettings(lr=lr)))
    assert list(values) == sorted(values)
    assert values["files"] == [str(path) for path in paths]
    assert (values["lr"], values["model"], values["saves"]) == (lr, "m", False)


@dataclass(frozen=True)
class WordySettings:
    freeze: bool | str = flag(False, "freezes", words=("new_rows",))
    kinds: list[str] | None = flag(
        None, "kinds", nargs="*", choices=("a", "b"), unset_means=(), unordered=True
    )


def read_wordy(*words: str) -> WordySettings:
    parser = ArgumentParser(prog="script.py")
    add_settings(parser, WordySettings)
    return read_settings(WordySettings, parser.parse_args(words))


def test_a_switch_may_have_values_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    given = {(): False, ("--freeze",): True, ("--freeze", "no"): False, ("--freeze", "new_rows"): "new_rows"}
    assert {words: read_wordy(*words).freeze for words in given} == given
    with pytest.raises(SystemExit):
        read_wordy("--freeze", "rows")
    assert "--freeze rows: use True or False or new_rows" in capsys.readouterr().err


def test_values_without_an_order_mean_the_same_in_any() -> None:
    kinds = flags_of([WordySettings()])["kinds"]
    assert read_wordy("--kinds", "b", "a").kinds == ["b", "a"]
    assert kinds.meaning(["b", "a", "a"]) == kinds.meaning(["a", "b"])
    assert kinds.meaning(None) == kinds.meaning(read_wordy("--kinds").kinds) == []
