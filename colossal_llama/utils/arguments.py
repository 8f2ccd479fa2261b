"""Command-line parsing shared by every script: all mistakes reported in one go, shared flags declared once.

Nothing heavy is imported here: `--help` has to answer in under a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from colossal_llama.utils.errors import USER_ERROR_EXIT_CODE, UserError, is_main_process, print_problems

TRUE_WORDS = ("true", "1", "yes")
FALSE_WORDS = ("false", "0", "no")

MAX_ROW_TOKENS = 2**24  # far beyond any model; packing keeps a number for every free space in a row

_INVALID = object()


def parse_bool(text: str) -> bool:
    """`True/False/1/0/yes/no`, in any case."""
    word = text.strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError("use True or False")


def number(
    kind: type[int] | type[float],
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
) -> Callable[[str], int | float]:
    """A converter for numbers in a range; `minimum` and `maximum` are allowed values, `above` is not."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError("use a finite number")
        if minimum is not None and value < minimum:
            raise ValueError(f"must be at least {minimum}")
        if maximum is not None and value > maximum:
            raise ValueError(f"must be at most {maximum}")
        if above is not None and value <= above:
            raise ValueError(f"must be above {above}")
        return value

    convert.__name__ = {"int": "a whole number", "float": "a number"}[kind.__name__]
    return convert


positive_int = number(int, minimum=1)
non_negative_int = number(int, minimum=0)
seed_number = number(int, 0, 2**31 - 1)


def existing_directory(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise ValueError("no such directory")
    if not path.is_dir():
        raise ValueError("is not a directory")
    return path


def existing_file(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise ValueError("no such file")
    if not path.is_file():
        raise ValueError("is not a file")
    return path


def directory_list(text: str) -> list[Path]:
    """A comma-separated list of existing directories."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("give at least one directory")
    problems = []
    for name in names:
        try:
            existing_directory(name)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return [Path(name) for name in names]


class ArgumentParser(argparse.ArgumentParser):
    """argparse that reports every bad argument together and exits with code 2.

    argparse stops at the first value that does not convert. Here converters and choices record what is
    wrong and parsing continues; `parse_args` prints all of it, with missing and unknown flags, on rank 0
    only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.problems: list[str] = []
        self._checks: list[Callable[[argparse.Namespace], list[str]]] = []
        self._required: list[argparse.Action] = []

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return _declare(self, super().add_argument, args, kwargs)

    def add_argument_group(self, *args: Any, **kwargs: Any) -> argparse._ArgumentGroup:
        group = super().add_argument_group(*args, **kwargs)
        declare = group.add_argument
        group.add_argument = lambda *a, **k: _declare(self, declare, a, k)  # type: ignore[method-assign]
        return group

    def add_flag(
        self, name: str, default: bool, help: str, group: Any = None, words: Sequence[str] = ()
    ) -> argparse.Action:
        """A boolean: `--x`, `--x True`, `--x False`; one that is on by default also has `--no-x`.

        Args:
            words: values that are accepted beside the boolean ones, and stay text.
        """
        names = [name] if not default else [name, f"--no-{name.removeprefix('--')}"]
        more = {"words": tuple(words)} if words else {}
        return (group or self).add_argument(*names, action=_FlagAction, default=default, help=help, **more)

    def add_check(self, check: Callable[[argparse.Namespace], list[str]]) -> None:
        """`check` gets arguments that are each valid by themselves, and returns messages on how they
        clash.
        """
        self._checks.append(check)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        self.problems.clear()
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.problems.append(f"unknown arguments: {' '.join(unknown)} (see --help)")
        for action in self._required:
            if getattr(parsed, action.dest) is None:
                self.problems.append(f"{'/'.join(action.option_strings)}: required, but not given")
        if not self.problems:
            for check in self._checks:
                self.problems.extend(check(parsed))
        if self.problems:
            self._exit_with_problems()
        return parsed

    def error(self, message: str) -> NoReturn:
        self.problems.append(message)
        self._exit_with_problems()

    def _exit_with_problems(self) -> NoReturn:
        if is_main_process():
            print_problems(self.problems)
            print(f"{self.prog} --help lists every argument", file=sys.stderr)
        sys.exit(USER_ERROR_EXIT_CODE)


def _declare(parser: ArgumentParser, declare: Callable, args: tuple, kwargs: dict) -> argparse.Action:
    name = next((a for a in args if a.startswith("--")), args[0] if args else kwargs.get("dest", ""))
    required = kwargs.pop("required", False)
    choices = kwargs.pop("choices", None)
    converter = kwargs.get("type")
    if choices is not None:
        kwargs.setdefault("metavar", "{" + ",".join(map(str, choices)) + "}")
    if converter is not None or choices is not None:
        kwargs["type"] = _recording(parser, name, converter or str, choices)
    action = declare(*args, **kwargs)
    if isinstance(action, _FlagAction):
        action.parser = parser
    if required:
        parser._required.append(action)
    return action


def _recording(parser: ArgumentParser, name: str, converter: Callable, choices: Sequence | None) -> Callable:
    def convert(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        try:
            value = converter(text)
        except (ValueError, TypeError) as error:
            kind = {"int": "a whole number", "float": "a number"}.get(converter.__name__, converter.__name__)
            reason = str(error)
            if reason.startswith(("invalid literal", "could not convert")):
                reason = f"is not {kind}"
            parser.problems.append(f"{name} {text}: {reason}")
            return _INVALID
        if choices is not None and value not in choices:
            parser.problems.append(f"{name} {text}: choose from {', '.join(map(str, choices))}")
            return _INVALID
        return value

    return convert


class _FlagAction(argparse.Action):
    parser: ArgumentParser

    def __init__(
        self,
        option_strings: list[str],
        dest: str,
        default: bool,
        help: str,
        words: tuple[str, ...] = (),
    ) -> None:
        metavar = "|".join(("True", "False", *words))
        super().__init__(option_strings, dest=dest, nargs="?", default=default, help=help, metavar=metavar)
        self.words = words

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values in self.words:
            setattr(namespace, self.dest, values)
            return
        try:
            value = True if values is None else parse_bool(values)
        except ValueError as error:
            others = "".join(f" or {word}" for word in self.words)
            self.parser.problems.append(f"{option_string} {values}: {error}{others}")
            return
        negated = option_string is not None and option_string.startswith("--no-")
        setattr(namespace, self.dest, value != negated)


class _HelpFormatter(argparse.HelpFormatter):
    """Appends the default to each help text that does not speak of it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(110, int(os.environ.get("COLUMNS", 110))))

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default in (None, argparse.SUPPRESS) or "default" in text or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


def add_seed(parser: ArgumentParser, group: Any = None) -> None:
    (group or parser).add_argument("--seed", type=seed_number, default=42, help="seed of every random choice")


def add_trust_remote_code(parser: ArgumentParser, group: Any = None) -> None:
    parser.add_flag(
        "--trust_remote_code",
        default=False,
        help="run Python code that the model directory or hub repository ships; off: its files are only data",
        group=group,
    )


def require(condition: bool, problem: str) -> None:
    """Raises `UserError(problem)` unless the condition holds."""
    if not condition:
        raise UserError(problem)
