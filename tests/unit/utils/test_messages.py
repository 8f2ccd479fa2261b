"""Reasons of libraries in one line, and lists that say how much they leave out."""

from __future__ import annotations

import pytest

from colossal_llama.utils.messages import cap_problems, first_line, join_names, one_line


@pytest.mark.parametrize(
    ("message", "first", "whole"),
    [
        ("a  b", "a  b", "a b"),
        ("\n a\n\tb\n", "a", "a b"),
        (" \n", "ValueError", "ValueError"),
        ("", "ValueError", "ValueError"),
    ],
)
def test_reasons(message: str, first: str, whole: str) -> None:
    assert first_line(ValueError(message)) == first
    assert one_line(ValueError(message)) == whole


def test_a_long_reason_is_cut_at_a_word() -> None:
    assert one_line(ValueError("one two three"), 10) == "one two …"
    assert one_line(ValueError("one two"), 10) == "one two"


def test_lists_say_how_much_they_leave_out() -> None:
    problems = [str(number) for number in range(21)]
    assert cap_problems(problems[:20], "lines") == problems[:20]
    assert cap_problems(problems, "lines") == [*problems[:20], "… and 1 more lines"]
    assert cap_problems(problems[:20], total=1020)[20:] == ["… and 1,000 more"]
    assert cap_problems(problems, most=1) == ["0", "… and 20 more"]
    assert join_names(problems[:2], 2) == "0, 1"
    assert join_names(problems[:3], 2, "; ") == "0; 1 and 1 more"
