"""Each way to make new rows against its formula, written again in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_cases import FORMULAS

from colossal_llama.model.initializations import INITIALIZATIONS

ROWS = 40


def test_every_way_has_a_formula() -> None:
    assert FORMULAS.keys() == INITIALIZATIONS.keys()


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(
    subtokens=st.lists(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=30), min_size=1, max_size=20)
)
def test_rows_are_what_the_formula_says(name: str, dtype: torch.dtype, subtokens: list[list[int]]) -> None:
    matrix = torch.randn(ROWS, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = INITIALIZATIONS[name](matrix, subtokens)
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row, ids in zip(rows, subtokens, strict=True):
        expected = FORMULAS[name](matrix[ids].double())
        torch.testing.assert_close(row.double(), expected, rtol=2e-5, atol=2e-6)


def test_weights_of_very_many_subtokens_stay_finite() -> None:
    matrix = torch.eye(3)
    (row,) = INITIALIZATIONS["weighted"](matrix, [[0, 1] * 1000 + [2]])
    # From the end: 1/2 for row 2, then 1/4 + 1/16 + … for row 1, and half of that for row 0.
    torch.testing.assert_close(row, torch.tensor([1 / 6, 1 / 3, 1 / 2]))


def test_a_mean_of_nothing_keeps_its_length() -> None:
    """Two rows that cancel out have a mean without direction."""
    (row,) = INITIALIZATIONS["rescaled"](torch.tensor([[1.0, -2.0], [-1.0, 2.0]]), [[0, 1]])
    assert torch.equal(row, torch.zeros(2))
