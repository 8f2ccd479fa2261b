"""Parts of messages that many places need: reasons of libraries, and lists that are cut short."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

MAX_LISTED_PROBLEMS = 20


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException, max_length: int | None = None) -> str:
    """The whole message of an exception in one line; the name of its type where it has none.

    Args:
        max_length: characters after which it is cut short; None for no limit.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if max_length is None else textwrap.shorten(text, max_length, placeholder=" …")


def cap_problems(
    problems: Sequence[str], what: str = "", most: int = MAX_LISTED_PROBLEMS, total: int | None = None
) -> list[str]:
    """The first of `problems`, and how many more there are.

    >>> cap_problems(["a", "b", "c", "d"], "bad lines", most=2)
    ['a', 'b', '… and 2 more bad lines']

    Args:
        what: the problems are, in the plural.
        most: how many are listed.
        total: how many there are, where `problems` does not hold all of them.
    """
    rest = (len(problems) if total is None else total) - min(len(problems), most)
    return [*problems[:most], *([f"… and {rest:,} more {what}".rstrip()] if rest > 0 else [])]


def join_names(names: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first of `names` in a row, and how many more there are.

    >>> join_names(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = len(names) - most
    return separator.join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
