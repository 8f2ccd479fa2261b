"""Text given out token by token is what the tokenizer decodes from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from colossal_llama.inference.streaming import StreamDecoder

TEXTS = [
    "The river carries cold water.",
    "长江 is the longest river, 约六千三百公里。",
    "  two spaces,\n\n\ttabs   and more  ",
    "👩‍🔬 é e\u0301 한국어 \U0001f600",
    "a . b ' s n't ,",
]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[2, 3])
def tokenizer(request: pytest.FixtureRequest, llama2_tokenizer_dir: Path, llama3_tokenizer_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(llama2_tokenizer_dir if request.param == 2 else llama3_tokenizer_dir)


def decode_all(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(tokenizer: Any, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push(token_id) for token_id in ids), decoder.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    streamed = "".join(stream(tokenizer, ids))
    assert streamed == decode_all(tokenizer, ids)
    # Sentencepiece takes a leading space for its own, and decoding takes it out.
    assert streamed.lstrip(" ") == text.lstrip(" ")


@QUICK
@given(text=st.text(max_size=40))
def test_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert "".join(stream(tokenizer, ids)) == decode_all(tokenizer, ids)


@QUICK
@given(data=st.data())
def test_any_tokens_with_special_ones_among_them(tokenizer: Any, data: st.DataObject) -> None:
    words = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    ids = data.draw(st.lists(st.sampled_from([*words, tokenizer.bos_token_id]), max_size=20))
    assert "".join(stream(tokenizer, ids)) == decode_all(tokenizer, ids)


def test_no_half_characters(tokenizer: Any) -> None:
    ids = tokenizer.encode("长江", add_special_tokens=False)
    assert len(ids) > 2
    assert [piece for piece in stream(tokenizer, ids) if piece] == ["长", "江"]


def test_words_come_at_once(tokenizer: Any) -> None:
    """No token waits for the next: each has its text as soon as it is there, the space in front included."""
    ids = tokenizer.encode("The river carries cold water", add_special_tokens=False)
    pieces = stream(tokenizer, ids)
    assert all(pieces[:-1])
    assert pieces[-1] == ""


def test_stray_bytes_do_not_hide_text(llama2_tokenizer_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama2_tokenizer_dir)
    (stray,) = [tokenizer.convert_tokens_to_ids("<0xE9>")]
    ids = [
        *tokenizer.encode("长", add_special_tokens=False),
        stray,
        *tokenizer.encode("river", add_special_tokens=False),
    ]
    assert "".join(stream(tokenizer, ids)) == "长\ufffd river"
    assert "".join(stream(tokenizer, [stray])) == "\ufffd"
