"""Settings classes declare flags, and get back what was parsed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from colossal_llama.utils.arguments import ArgumentParser, positive_int
from colossal_llama.utils.settings import add_settings, flag, parse_settings


@dataclass(frozen=True)
class Sizes:
    width: int = flag(None, "width", type=positive_int, required=True)
    depth: int = flag(2, "depth", type=positive_int)
    tied: bool = flag(False, "one matrix")


def check(sizes: Sizes) -> list[str]:
    return ["--depth: more than --width"] if sizes.depth > sizes.width else []


@pytest.mark.parametrize("title", [None, "sizes of the model"])
def test_settings_come_back(title: str | None, capsys: pytest.CaptureFixture) -> None:
    parser = ArgumentParser(prog="x.py")
    add_settings(parser, Sizes, title, check)
    assert parse_settings(parser, Sizes, ["--width", "4", "--tied"]) == Sizes(4, 2, True)
    assert ("sizes of the model:" in parser.format_help()) == (title is not None)
    for words, problem in (
        ([], "--width: required, but not given"),
        (["--width", "x"], "--width x: is not a whole number"),
        (["--width", "1"], "--depth: more than --width"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse_settings(parser, Sizes, words)
        assert stopped.value.code == 2
        assert f"error: {problem}" in capsys.readouterr().err
