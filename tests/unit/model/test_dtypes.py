"""A type of numbers has one entry in a table, whichever of its names is asked for."""

from __future__ import annotations

import pytest
import torch

from colossal_llama.model.dtypes import (
    FLOAT_FLAGS,
    ITEM_BYTES,
    flag_name,
    is_float,
    safetensors_name,
    torch_dtype,
    torch_name,
)


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_names_lead_back(name: str) -> None:
    dtype = torch_dtype(name)
    if dtype is None:
        assert name in ("U64", "U32", "U16")
        return
    assert dtype.itemsize == ITEM_BYTES[name]
    assert safetensors_name(dtype) == name
    assert torch_name(name) == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", FLOAT_FLAGS)
def test_names_of_flags(name: str) -> None:
    assert torch_dtype(name) is torch_dtype(FLOAT_FLAGS[name])
    assert flag_name(torch_dtype(name)) == name
    assert is_float(FLOAT_FLAGS[name])


def test_types_that_files_cannot_hold() -> None:
    assert safetensors_name(torch.complex64) is None
    assert flag_name(torch.int8) is None
    assert not is_float("F64")
