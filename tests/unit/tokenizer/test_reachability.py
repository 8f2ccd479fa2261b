"""The simulation against sentencepiece itself; intermediates: enough, and none too many."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_cases import make_proto

from colossal_llama.tokenizer.reachability import last_parts, plan_intermediates, unreachable_pieces

words = st.text(alphabet="abc", min_size=2, max_size=6)
piece_lists = st.lists(words, min_size=1, max_size=12, unique=True).map(lambda found: [*"abc", *found])


def processor(pieces: list[str]):
    from sentencepiece import SentencePieceProcessor

    result = SentencePieceProcessor()
    result.LoadFromSerializedProto(make_proto(pieces, add_dummy_prefix=False).SerializeToString())
    return result


def score_of(pieces: list[str]) -> dict[str, float]:
    return {piece: -float(rank) for rank, piece in enumerate(pieces)}


@settings(max_examples=300, deadline=None)
@given(piece_lists, st.text(alphabet="abc", min_size=1, max_size=16))
def test_joins_as_sentencepiece_does(pieces: list[str], text: str) -> None:
    expected = processor(pieces).encode(text, out_type=str)
    parts = last_parts(text, score_of(pieces))
    if len(parts) == 2 and "".join(parts) in pieces:
        parts = ["".join(parts)]
    assert parts == expected


@settings(max_examples=150, deadline=None)
@given(piece_lists, st.lists(st.text(alphabet="abc|", max_size=30), min_size=1, max_size=20))
def test_unreachable_pieces_never_occur_and_reachable_ones_do(pieces: list[str], texts: list[str]) -> None:
    """`|` is in no piece: it keeps what is on either side apart."""
    unreachable = unreachable_pieces(pieces, list, score_of(pieces))
    trained = processor(pieces)
    seen = {piece for encoded in trained.encode(texts, out_type=str) for piece in encoded}
    assert not seen & unreachable.keys()
    for piece in set(pieces) - unreachable.keys():
        assert trained.encode(f"|{piece}|", out_type=str)[1] == piece


@settings(max_examples=200, deadline=None)
@given(piece_lists)
def test_intermediates_make_everything_reachable_and_none_is_superfluous(pieces: list[str]) -> None:
    scores = score_of(pieces)
    unreachable = unreachable_pieces(pieces, list, scores)
    intermediates = plan_intermediates(unreachable, list, scores, lambda score: score - 1)
    assert not set(intermediates) & set(pieces)
    complete = [*pieces, *intermediates]
    assert not unreachable_pieces(pieces, list, score_of(complete))
    for intermediate in intermediates:
        without = [piece for piece in complete if piece != intermediate]
        assert unreachable_pieces(pieces, list, score_of(without)), intermediate


def test_intermediates_are_shared() -> None:
    pieces = [*"abcde", "abcd", "abce", "cabd"]
    scores = score_of(pieces)
    intermediates = plan_intermediates(
        unreachable_pieces(pieces, list, scores), list, scores, lambda score: score - 1
    )
    assert intermediates[0] == "ab"
    assert len(intermediates) == 3


def test_forbidden_strings_do_not_become_intermediates() -> None:
    scores = score_of([*"abc", "abc"])
    unreachable = {"abc": ["a", "b", "c"]}
    assert plan_intermediates(unreachable, list, scores, lambda s: s - 1, forbidden={"ab"}) == ["bc"]
    assert plan_intermediates(unreachable, list, scores, lambda s: s - 1, forbidden={"ab", "bc"}) == []
