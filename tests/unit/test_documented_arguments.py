"""docs/arguments.md is what the parsers say."""

from __future__ import annotations

import re

import pytest
from support import ROOT, load_script

ARGUMENTS = load_script(ROOT / "docs/make_arguments.py")


@pytest.mark.parametrize("columns", ["40", "200"])
def test_page_is_what_the_parsers_say(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    written = ARGUMENTS.PAGE.read_text(encoding="utf-8")
    assert written == ARGUMENTS.make_page(), f"an argument has changed: run `{ARGUMENTS.COMMAND}`"


@pytest.mark.parametrize("script", ARGUMENTS.SCRIPTS)
def test_page_lists_every_argument_with_its_default(script: str) -> None:
    text = ARGUMENTS.PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(script)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section, f"docs/arguments.md has no section for {script}"
    rows = {
        match[0]: match[1]
        for match in re.findall(r"^\| `(--\w+)`[^|]*\| (.*?) ?(?<!\\)\|", section[1], flags=re.MULTILINE)
    }
    parser = ARGUMENTS.parser_of(script)
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        assert action.option_strings[0] in rows, f"{script}: {action.option_strings[0]} is not on the page"
        for alias in action.option_strings:
            assert f"`{alias}`" in section[1]
        written = rows.pop(action.option_strings[0]).strip("`")
        if action in parser._required:
            assert written == "required"
        elif isinstance(action.default, bool):
            assert written == {True: "on", False: "off"}[action.default]
        elif action.default is not None and "default" not in (action.help or ""):
            assert written == str(action.default), f"{script} {action.option_strings[0]}"
    assert not rows, f"docs/arguments.md lists arguments that {script} does not have: {list(rows)}"


def test_page_says_what_a_resume_may_do_with_arguments_of_train() -> None:
    text = ARGUMENTS.PAGE.read_text(encoding="utf-8")
    for argument, rule in {
        "--num_workers": "may change",
        "--batch_size": "may change with the layout",
        "--lr": "must stay",
    }.items():
        assert re.search(rf"^\| `{argument}`.* \| {rule} \|$", text, flags=re.MULTILINE)


def test_every_default_and_choice_is_readable() -> None:
    """No address of an object and no path of this machine: the page is the same everywhere."""
    text = ARGUMENTS.PAGE.read_text(encoding="utf-8")
    assert not re.findall(rf" at 0x|PosixPath|{re.escape(str(ROOT))}", text)
