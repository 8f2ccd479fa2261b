"""Documents against a slow reference: one record at a time, the mask decided token by token."""

from __future__ import annotations

import pytest
from encoder_cases import MakeEncoder, check_accounts, encode_slowly, joined, no_surrogates
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colossal_llama.corpus.records import BadRecord
from colossal_llama.dataset.encoders.pretraining import PretrainRecord
from colossal_llama.dataset.labels import split_signed


def reference_document(tokenizer, source: str, target: str) -> tuple[list[int], list[int]]:
    """(input_ids, labels) of a pre-training record, as the specification words it."""
    ids, offsets = encode_slowly(tokenizer, source + target)
    input_ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    if not source:
        return input_ids, list(input_ids)
    has_loss = [False, *(end > len(source) for _, end in offsets), True]
    return input_ids, [i if loss else -100 for i, loss in zip(input_ids, has_loss, strict=True)]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(pairs=st.lists(st.tuples(no_surrogates, no_surrogates), min_size=1, max_size=6))
def test_documents_equal_the_slow_reference(tokenizer, make_encoder: MakeEncoder, pairs: list) -> None:
    records = [PretrainRecord(source, target, "c") for source, target in pairs]
    for record, outcome in zip(records, make_encoder().encode(records), strict=True):
        check_accounts(outcome)
        input_ids, labels = reference_document(tokenizer, record.source, record.target)
        assert outcome.num_tokens == len(input_ids)
        if record.target:
            assert joined(outcome) == (input_ids, labels)
        else:
            assert outcome.reason == ("empty target" if record.source else "empty record")


def test_a_token_across_the_boundary_has_loss(tokenizer, make_encoder: MakeEncoder) -> None:
    """ "th" + "e": one token holds the end of the source and the beginning of the target."""
    (outcome,) = make_encoder().encode([PretrainRecord("in th", "e river", "c")])
    input_ids, labels = joined(outcome)
    plain = encode_slowly(tokenizer, "in the river")[0]
    assert input_ids[1:-1] == plain
    first = labels.index(next(label for label in labels if label != -100))
    kept = tokenizer.decode(labels[first:-1])
    assert kept.strip() == "the river"


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(source=no_surrogates, target=no_surrogates.filter(bool), max_length=st.integers(2, 40))
def test_long_documents_are_chunked(
    tokenizer, make_encoder: MakeEncoder, source: str, target: str, max_length: int
) -> None:
    (outcome,) = make_encoder(max_length=max_length).encode([PretrainRecord(source, target, "c")])
    check_accounts(outcome)
    input_ids, labels = reference_document(tokenizer, source, target)
    found = [tuple(a.tolist() for a in split_signed(piece)) for piece in outcome.pieces]
    assert all(any(label != -100 for label in labels[1:]) for _, labels in found)
    assert found[-1][0][-1] == tokenizer.eos_token_id
    if len(input_ids) % max_length != 1:
        chunks = [
            (input_ids[i : i + max_length], labels[i : i + max_length])
            for i in range(0, len(input_ids), max_length)
        ]
        assert found == [chunk for chunk in chunks if any(label != -100 for label in chunk[1])]
    assert ("chunked" in outcome.notes) == (len(input_ids) > max_length)


def test_long_documents_are_truncated_when_asked(tokenizer, make_encoder: MakeEncoder) -> None:
    encoder = make_encoder(max_length=8, long_documents="truncate")
    text = "The river carries cold water from the mountains to the sea."
    kept, without_label = encoder.encode([PretrainRecord("", text, "c"), PretrainRecord(text, "x", "c")])
    input_ids, labels = reference_document(tokenizer, "", text)
    assert joined(kept) == (input_ids[:8], labels[:8])
    assert kept.dropped_tokens == {"beyond max_length": len(input_ids) - 8}
    assert kept.notes == ["truncated"]
    assert without_label.pieces == []
    assert without_label.reason == "no label in the part kept"
    for outcome in (kept, without_label):
        check_accounts(outcome)


def test_records_are_checked(make_encoder: MakeEncoder) -> None:
    good = {"source": "", "target": "x", "category": "c", "id": 7}
    assert make_encoder().parse(good) == PretrainRecord("", "x", "c")
    for field in ("source", "target", "category"):
        with pytest.raises(BadRecord, match=f"'{field}' is missing"):
            make_encoder().parse({k: v for k, v in good.items() if k != field})
        with pytest.raises(BadRecord, match=f"'{field}' is null, not a string"):
            make_encoder().parse({**good, field: None})


@pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"messages": [], "category": "c"}, "found 'messages'.*prepare_sft_dataset.py"),
        ({"conversations": []}, "found 'conversations'.*prepare_sft_dataset.py"),
        ({"instruction": "a", "output": "b"}, "found 'instruction'.*prepare_sft_dataset.py"),
        ({"text": "a"}, "found 'text'.*--text_field text"),
    ],
)
def test_records_of_another_kind_name_what_is_for_them(
    make_encoder: MakeEncoder, record: dict, remedy: str
) -> None:
    with pytest.raises(BadRecord, match=remedy):
        make_encoder().parse(record)
