"""From the command line of a prepare script to `PreparationSettings`: the one place that sees argparse."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from colossal_llama.dataset.settings import (
    PathSettings,
    PreparationSettings,
    PretrainSettings,
    RowSettings,
    SftSettings,
    WorkerSettings,
)
from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.output_checks import why_not_output_directory
from colossal_llama.utils.settings import add_settings, read_settings

TITLES = {PretrainSettings: "documents", SftSettings: "conversations"}


def preparation_parser(
    prog: str, description: str | None, records: type[PretrainSettings | SftSettings]
) -> ArgumentParser:
    """The parser of a prepare script for records of one kind."""
    parser = ArgumentParser(prog=prog, description=description)
    add_settings(parser, PathSettings, "input and output")
    add_settings(parser, RowSettings, "data")
    add_settings(parser, records, TITLES[records])
    add_settings(parser, WorkerSettings, "workers")
    parser.add_check(lambda parsed: find_conflicts(read_settings(PathSettings, parsed)))
    return parser


def parse_settings(
    parser: ArgumentParser,
    records: type[PretrainSettings | SftSettings],
    arguments: Sequence[str] | None = None,
) -> PreparationSettings:
    """What the command line asks for; exits with code 2 and every problem at once where it is wrong."""
    parsed: argparse.Namespace = parser.parse_args(arguments)
    return PreparationSettings(
        records=read_settings(records, parsed),
        paths=read_settings(PathSettings, parsed),
        rows=read_settings(RowSettings, parsed),
        workers=read_settings(WorkerSettings, parsed),
    )


def find_conflicts(paths: PathSettings) -> list[str]:
    """Output must be writable; in an input directory it would be read as input by the next run."""
    problems = [
        f"{flag} {directory}: {objection}"
        for flag, directory in (
            ("--data_output_dirs", paths.data_output_dirs),
            ("--data_arrow_output_dir", paths.data_arrow_output_dir),
        )
        if directory is not None and (objection := why_not_output_directory(directory))
    ]
    if problems:
        return problems
    written = {
        path.resolve()
        for path in (
            paths.data_output_dirs,
            paths.data_output_dirs / "jsonl",
            paths.arrow_dir,
            paths.held_out_dir,
        )
    }
    if paths.recursive:  # a next run would read what lies anywhere below
        written |= {parent for path in written for parent in path.parents}
    return [
        f"--data_output_dirs {paths.data_output_dirs}: would write into the input directory {directory}"
        for directory in paths.data_input_dirs
        if isinstance(directory, Path) and directory.resolve() in written
    ]
