"""Settings: frozen dataclasses whose fields are command-line flags, each declared once.

    @dataclass(frozen=True)
    class OptimizerSettings:
        lr: float = flag(3e-4, "peak learning rate", type=number(float, minimum=0))
        use_neft: bool = flag(False, "NEFTune noise on the embeddings")

`add_settings` declares the flags of a class on a parser; `read_settings` makes the object from what was
parsed, `parse_settings` from the command line.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from colossal_llama.utils.arguments import ArgumentParser

Settings = TypeVar("Settings")


class OnResume(Enum):
    """What a run that continues from a checkpoint may do with a flag."""

    FIXED = "must have the value that the run was started with"
    WITH_LAYOUT = "may change where the layout changes too"
    SCHEDULE = "may change as long as no step that was done would have had another learning rate"
    FREE = "may change"


@dataclass(frozen=True)
class Flag:
    """How a setting is given on the command line.

    Attributes:
        help: what it does, with its unit.
        type: converts the text; raises ValueError with what is wrong.
        words: of a boolean: values beside True and False.
        repeatable: can be given several times; the setting is the list of values.
        also: other names that are accepted.
        on_resume: what a run that continues from a checkpoint may do with it.
        unset_means: the value that None means.
        unordered: several values mean the same in any order.
    """

    help: str
    type: Callable[[str], Any] | None = None
    choices: Sequence[Any] | None = None
    words: tuple[str, ...] = ()
    nargs: str | None = None
    repeatable: bool = False
    required: bool = False
    also: tuple[str, ...] = ()
    on_resume: OnResume = OnResume.FIXED
    unset_means: Any = None
    unordered: bool = False
    default: Any = None

    def meaning(self, value: Any) -> Any:
        """What tells two values apart that are written differently and mean the same."""
        value = self.unset_means if value is None else value
        return sorted(set(value)) if self.unordered else value


def flag(default: Any, help: str, **options: Any) -> Any:
    """A field of a settings class; `options` are the attributes of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help, default=default, **options)})


def add_settings(
    parser: ArgumentParser,
    settings: type[Settings],
    title: str | None = None,
    check: Callable[[Settings], list[str]] | None = None,
) -> None:
    """Declares a flag for every field of a settings class.

    Args:
        title: of a group of the `--help` page; None for no group.
        check: returns messages on how settings clash that are each valid by themselves.
    """
    group = parser if title is None else parser.add_argument_group(title)
    if check is not None:
        parser.add_check(lambda parsed: check(read_settings(settings, parsed)))
    for each in dataclasses.fields(settings):  # type: ignore[arg-type]
        declared: Flag = each.metadata["flag"]
        if isinstance(each.default, bool):
            parser.add_flag(
                f"--{each.name}",
                default=each.default,
                help=declared.help,
                group=group,
                words=declared.words,
            )
            continue
        options = {
            "type": declared.type,
            "choices": declared.choices,
            "nargs": declared.nargs,
            "action": "append" if declared.repeatable else None,
        }
        group.add_argument(
            f"--{each.name}",
            *declared.also,
            default=each.default,
            required=declared.required,
            help=declared.help,
            **{name: value for name, value in options.items() if value is not None},
        )


def read_settings(settings: type[Settings], parsed: argparse.Namespace) -> Settings:
    """The settings object with the values that were parsed."""
    names = (each.name for each in dataclasses.fields(settings))  # type: ignore[arg-type]
    return settings(**{name: getattr(parsed, name) for name in names})


def parse_settings(
    parser: ArgumentParser, settings: type[Settings], arguments: Sequence[str] | None = None
) -> Settings:
    """The settings object of a parser that declares its flags; exits with code 2 where a flag is wrong."""
    return read_settings(settings, parser.parse_args(arguments))


def flags_of(parts: Sequence[Any]) -> dict[str, Flag]:
    """Name -> declaration of every flag of some settings."""
    return {each.name: each.metadata["flag"] for part in parts for each in dataclasses.fields(part)}


def as_json(parts: Sequence[Any]) -> Mapping[str, Any]:
    """The values of all flags by name, sorted; paths are text."""
    values = {each.name: getattr(part, each.name) for part in parts for each in dataclasses.fields(part)}
    return {name: _plain(value) for name, value in sorted(values.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
