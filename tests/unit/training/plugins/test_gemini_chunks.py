"""Chunks hold every tensor, pad little, and are several however small the model is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import LLAMA2_7B, make_config, plugin_of

from colossal_llama.training.plugins.gemini_chunks import (
    FEWEST_CHUNKS,
    SMALLEST_CHUNK,
    choose_chunk_size,
    deal_tensors,
    largest_neighbours,
)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=60), st.integers(1, 9))
def test_every_tensor_is_in_one_chunk(sizes: list[int], world_size: int) -> None:
    chunk_size = choose_chunk_size(sizes, world_size)
    chunks = deal_tensors(sizes, chunk_size, world_size)
    assert all(chunk % world_size == 0 for chunk in chunks)
    assert sum(chunks) >= sum(sizes)
    # Dealt once more, as one would by hand.
    remaining = list(sizes)
    for chunk in chunks:
        assert chunk == max(chunk_size, remaining[0] + -remaining[0] % world_size)
        while remaining and remaining[0] <= chunk:
            chunk -= remaining.pop(0)
    assert not remaining
    assert max(chunks) <= largest_neighbours(chunks) <= 2 * max(chunks)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_small_model_has_several_chunks(world_size: int) -> None:
    sizes = plugin_of("--plugin gemini").count_held_parameters(make_config()).tensors
    chunks = deal_tensors(sizes, choose_chunk_size(sizes, world_size), world_size)
    assert FEWEST_CHUNKS / 2 <= len(chunks) <= 2 * FEWEST_CHUNKS
    assert sum(chunks) < 1.2 * sum(sizes)


@pytest.mark.parametrize("world_size", [1, 8, 64])
def test_a_large_model_has_large_chunks_that_pad_little(world_size: int) -> None:
    sizes = plugin_of("--plugin gemini").count_held_parameters(LLAMA2_7B).tensors
    chunk_size = choose_chunk_size(sizes, world_size)
    assert SMALLEST_CHUNK <= chunk_size <= 2 * SMALLEST_CHUNK
    assert sum(deal_tensors(sizes, chunk_size, world_size)) < 1.02 * sum(sizes)
