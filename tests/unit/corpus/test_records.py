"""One line to one record: what is not JSON, and what is of another type, is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.corpus import records
from colossal_llama.corpus.records import BadRecord


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", "score": NaN}', "'score' is NaN; write null, or the record without it"),
        (b'{"a": [{"b": -Infinity}]}', "'a[0].b' is infinite, or too large a number; write null, or "),
        (b'{"a": 1e999}', "'a' is infinite, or too large a number; write null"),
        (b'{"a": ' + b"9" * 5000 + b"}", "'a' is infinite, or too large a number; write null"),
        (b'{"a": {"b": "x\\ud83d"}}', "'a.b' holds half of a surrogate pair, \\ud83d; write the whole pair"),
        (b'{"\\ud83d": 1}', "'a name in the record[0]' holds half of a surrogate pair"),
        (b'{"a": ' + b"[" * 3000 + b"]" * 3000 + b"}", "depth limit exceeded, column "),
    ],
)
def test_what_only_python_calls_json_is_named_with_its_field(line: bytes, message: str) -> None:
    with pytest.raises(BadRecord) as caught:
        records.parse_object(line)
    assert caught.value.kind == "not valid JSON"
    assert f"not valid JSON ({message}" in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(st.characters(exclude_categories=[])),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
        max_leaves=8,
    )
)
def test_whatever_python_writes_is_read_or_explained(value: object) -> None:
    line = json.dumps({"text": "a", "more": value}).encode()
    try:
        outcome = records.parse_object(line)["text"]
    except BadRecord as error:
        outcome = str(error)
    # A name with an apostrophe is in double quotes.
    assert outcome == "a" or any(where in outcome for where in ("'more", '"more', " in more["))


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"a": 1', "not valid JSON", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON", "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON", "not valid JSON"),
        (b'{"a": "\xff"}', "not UTF-8", "byte 7"),
        (b"[1]", "not a JSON object", "an array"),
        (b"null", "not a JSON object", "null"),
    ],
)
def test_lines_that_hold_no_object(line: bytes, kind: str, message: str) -> None:
    with pytest.raises(BadRecord, match=message) as caught:
        records.parse_object(line)
    assert caught.value.kind == kind


def test_fields() -> None:
    assert records.take_string({"a": ""}, "a") == ""
    with pytest.raises(BadRecord, match=r"'b' is missing \(compulsory; found 'a'\)"):
        records.take_string({"a": ""}, "b")
    for value, what in (
        (None, "null"),
        (1, "a number"),
        (True, "a boolean"),
        ([], "an array"),
        ({}, "an object"),
    ):
        with pytest.raises(BadRecord, match=f"'a' is {what}, not a string"):
            records.take_string({"a": value}, "a")
