"""The bill of an extension: by hand, and against a simulation that trains until it has paid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colossal_llama.tokenizer.extension_bill import (
    OCCURRENCES_TO_LEARN,
    ExtensionBill,
    describe_bill,
    format_bill,
    make_bill,
)
from colossal_llama.utils.llama_size import read_size

LLAMA2_7B = read_size(
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
)


def test_the_reference_extension_of_7b() -> None:
    bill = make_bill(LLAMA2_7B, 32000, 69104, 1205, 600, 37104, 500)
    assert bill.base_parameters == 6_738_415_616
    assert bill.parameters - bill.base_parameters == 2 * 4096 * 37104
    assert bill.multiplied - bill.base_multiplied == 4096 * 37104
    assert bill.saved_share == pytest.approx(605 / 1205)
    assert bill.learning_tokens == pytest.approx(OCCURRENCES_TO_LEARN * 37104 * 600 / 500)
    shown = dict(describe_bill(bill))
    assert shown["tokens saved"] == "50.2%"
    assert shown["parameters"].endswith("(+303,955,968, +4.5%)")
    assert shown["FLOPs per token"] == "+2.3%"
    assert shown["FLOPs for the same text"] == "-49.1%"
    assert shown["learning the new rows takes"] == "4.45 million tokens"
    text = format_bill("x", bill)
    assert "Assumed: " in text
    assert f"{OCCURRENCES_TO_LEARN} times on average" in text


@given(
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.integers(1, 10**5),
    st.integers(0, 10**6),
    st.integers(10**4, 10**10),
    st.integers(0, 10**9),
)
def test_at_the_payback_both_have_cost_the_same(
    tokens: int, saved: int, new: int, occurrences: int, base: int, added: int
) -> None:
    bill = ExtensionBill(tokens + saved, tokens, new, occurrences, base, base + added, base, base + added)
    paid = bill.payback_tokens
    if paid is None:
        assert occurrences == 0 or bill.compute_share >= 1 - 1e-9
        assert "never" in describe_bill(bill)[-1][1]
        return
    with_extension = (bill.learning_tokens + paid) * bill.multiplied
    without = paid * (tokens + saved) / tokens * bill.base_multiplied
    assert with_extension == pytest.approx(without, rel=1e-6)
    assert bill.compute_share < 1
