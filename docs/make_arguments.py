"""Writes docs/arguments.md, the page of all command-line arguments, from the parsers of the scripts.

    python docs/make_arguments.py

It is beside the page and not in the package, since only someone who changes an argument needs it. A unit test
compares the page with the parsers.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colossal_llama.training.settings import TITLES
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.settings import OnResume, flags_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "arguments.md"
COMMAND = "python docs/make_arguments.py"

# In the order of the pipeline.
SCRIPTS = (
    "colossal_llama/tokenizer/learn_pieces.py",
    "colossal_llama/tokenizer/init_tokenizer.py",
    "colossal_llama/tokenizer/compare_tokenizers.py",
    "colossal_llama/model/init_model.py",
    "colossal_llama/model/calibrate_output.py",
    "colossal_llama/model/measure_init.py",
    "colossal_llama/model/merge_models.py",
    "prepare_pretrain_dataset.py",
    "prepare_sft_dataset.py",
    "train.py",
    "colossal_llama/launch/preflight.py",
    "colossal_llama/evaluation/compare_models.py",
    "colossal_llama/evaluation/ledger.py",
    "inference_example.py",
    "examples/make_base_model.py",
    "examples/clean_corpus.py",
)
# Scripts whose parser is in a module of the package.
PARSER_MODULES = {
    "train.py": "colossal_llama.training.arguments",
    "inference_example.py": "colossal_llama.inference.arguments",
}

INTRODUCTION = f"""\
# Command-line arguments

<!-- Written by `{COMMAND}` from the parsers of the scripts. Do not edit this page: edit the help texts. -->

Every argument of every script, as `--help` lists them. An argument whose default is on or off is a switch:
`--name` turns it on, and `--name True` or `--name False` sets it (`1`, `0`, `yes` and `no` work too). A
switch that is on by default also has a `--no-` form. Abbreviated names are not accepted.
"""

RESUME = """\
*On resume* applies to a run that continues from a checkpoint (`--load_checkpoint` with a step directory, or
`latest`). *Must stay*: a value that differs from the saved one is an error that names the argument. *May
change with the layout*: a different value is accepted if the plugin, a parallel size or the number of
processes changes too. *May change the future*: a different value is accepted if the learning
rate of every step that was done stays what it was. Data and model may be at other paths, but must be the
same. A new stage, which starts from weights alone, may change everything.
"""

RESUME_RULES = {
    OnResume.FREE: "may change",
    OnResume.WITH_LAYOUT: "may change with the layout",
    OnResume.SCHEDULE: "may change the future",
    OnResume.FIXED: "must stay",
}


def parser_of(script: str) -> ArgumentParser:
    """The parser of a script of the clone, whichever module declares it."""
    if script in PARSER_MODULES:
        return importlib.import_module(PARSER_MODULES[script]).build_parser()
    return runpy.run_path(str(ROOT / script), run_name="arguments")["build_parser"]()


def make_page() -> str:
    """The text of docs/arguments.md."""
    contents = "\n".join(f"- [{script}](#{_anchor(script)})" for script in SCRIPTS)
    sections = ("\n".join(_section(script)) for script in SCRIPTS)
    return "\n".join([INTRODUCTION, contents, "", *sections])


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _section(script: str) -> Iterator[str]:
    parser = parser_of(script)
    resume_rules = {}
    if script == "train.py":
        flags = flags_of([settings for settings, _ in TITLES.values()])
        resume_rules = {name: RESUME_RULES[flag.on_resume] for name, flag in flags.items()}
    yield f"## {script}\n"
    for paragraph in re.split(r"\n\s*\n", (parser.description or "").strip()):
        yield _escape(" ".join(paragraph.split())) + "\n"
    if resume_rules:
        yield RESUME
    groups = [(group.title, _documented(group)) for group in parser._action_groups]
    groups = [(title, actions) for title, actions in groups if actions]
    for title, actions in groups:
        if len(groups) > 1:
            yield f"### {title}\n"
        yield from _table(actions, parser, resume_rules)
        yield ""


def _documented(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    return [
        action
        for action in group._group_actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]


def _table(
    actions: list[argparse.Action], parser: ArgumentParser, resume_rules: dict[str, str]
) -> Iterator[str]:
    columns = ["argument", "default", "values", "meaning", *(["on resume"] if resume_rules else [])]
    yield _row(columns)
    yield _row(["---"] * len(columns))
    for action in actions:
        names = action.option_strings or [str(action.metavar or action.dest)]
        meaning, default = _meaning_and_default(action)
        if action in parser._required:
            default = "required"
        cells = [", ".join(f"`{name}`" for name in names), default, _values(action), _escape(meaning)]
        yield _row(cells + ([resume_rules[action.dest]] if resume_rules else []))


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _meaning_and_default(action: argparse.Action) -> tuple[str, str]:
    """The help text and the default, which is taken out of a help text that ends with it."""
    meaning = (action.help or "") % {**vars(action), "prog": ""}
    written = re.search(r"\s*\(default: (.*)\)$", meaning)
    if written:
        return meaning[: written.start()], _default(written[1])
    return meaning, _default(action.default)


def _default(value: Any) -> str:
    """Values as code, descriptions of values as text."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == argparse.SUPPRESS:
        return ""
    return _escape(value) if isinstance(value, str) and " " in value else f"`{value}`"


def _values(action: argparse.Action) -> str:
    """The choices, or how many values the flag takes."""
    choices = str(action.metavar or "")
    if choices.startswith("{"):  # where ArgumentParser keeps them
        listed = ", ".join(f"`{choice}`" for choice in choices.strip("{}").split(","))
        return f"any of {listed}" if action.nargs == "*" else listed
    if getattr(action, "words", ()):  # a switch with values of its own
        return ", ".join(f"`{word}`" for word in choices.split("|"))
    return "one or more" if action.nargs == "+" else ""


def _escape(text: str) -> str:
    """Markdown that shows the text as it is; `code` stays code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def main() -> None:
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"Written: {PAGE}")


if __name__ == "__main__":
    main()
