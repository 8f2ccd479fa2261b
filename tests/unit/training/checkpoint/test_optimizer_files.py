"""Parts and slices of parameters, put together and cut for any layout."""

from __future__ import annotations

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_llama.training.checkpoint.files import write_safetensors
from colossal_llama.training.checkpoint.optimizer_files import (
    SavedOptimizer,
    cut_part,
    cut_slice,
    join_slices,
)
from colossal_llama.training.plugins.gemini_chunks import deal_tensors


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 13),
    columns=st.integers(1, 5),
    tensor=st.integers(1, 3),
    zero=st.integers(1, 4),
    padding=st.integers(1, 4),
    new_tensor=st.integers(1, 3),
    new_zero=st.integers(1, 4),
    dim=st.sampled_from([0, 1, None]),
)
def test_any_layout_reads_any_other(
    tmp_path_factory, rows, columns, tensor, zero, padding, new_tensor, new_zero, dim
):
    """Padded along the split dimension to a multiple of parts and `padding`, as plugins pad vocabularies."""
    whole = torch.randn(rows, columns)

    def shape_of(parts: int) -> tuple[int, int]:
        shape = [rows, columns]
        axis = dim or 0
        split = parts if dim is not None else 1
        multiple = split * padding
        shape[axis] = -(-shape[axis] // multiple) * multiple // split
        return shape[0], shape[1]

    def cut(parts: int, part: int, slices: int, index: int) -> torch.Tensor:
        """The layout's rule, written down once more with plain torch."""
        axis = dim or 0
        size = shape_of(parts)[axis] * (parts if dim is not None else 1)
        padded = torch.zeros([size, columns] if axis == 0 else [rows, size])
        padded[:rows, :columns] = whole
        local = padded.chunk(parts, dim=axis)[part] if dim is not None else padded
        flat = local.reshape(-1)
        flat = torch.cat([flat, torch.zeros(-flat.numel() % slices)])
        return flat.view(slices, -1)[index]

    directory = tmp_path_factory.mktemp("optimizer")
    for part in range(tensor):
        for index in range(zero):
            parts = {"w": {"shape": list(shape_of(tensor)), "dim": dim}}
            metadata = {"parts": parts, "steps": {"w": 3.0}, "scaler": {}}
            write_safetensors(
                directory / f"tp-{part:03d}_pp-000_zero-{index:04d}.safetensors",
                {"w/master": cut(tensor, part, zero, index)},
                {key: json.dumps(value) for key, value in metadata.items()},
            )
    saved = SavedOptimizer(directory)
    assert saved.has("w", "master")
    assert not saved.has("w", "exp_avg")
    assert saved.steps == {"w": 3.0}
    for part in range(new_tensor):
        for index in range(new_zero):
            expected = cut(new_tensor, part, new_zero, index)
            local = cut_part(saved.whole("w", "master"), shape_of(new_tensor), dim, part)
            assert local.shape == shape_of(new_tensor)
            found = cut_slice(local, index * expected.numel(), expected.numel())
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    chunk_size=st.integers(1, 60),
    world_size=st.integers(1, 4),
)
def test_slices_that_name_their_place_are_put_together(tmp_path_factory, sizes, chunk_size, world_size):
    """Cut where Gemini's chunks and shards end: a file holds slices of some parameters only."""
    values = [torch.randn(size) for size in sizes]
    files: list[tuple[dict, dict]] = [({}, {}) for _ in range(world_size)]
    number = 0
    for chunk in deal_tensors(sizes, chunk_size, world_size):
        begin, shard = 0, chunk // world_size
        while number < len(sizes) and begin + sizes[number] <= chunk:
            for rank, (tensors, parts) in enumerate(files):
                first = max(0, rank * shard - begin)
                last = min(sizes[number], (rank + 1) * shard - begin)
                if first < last:
                    tensors[f"p{number}/master"] = values[number][first:last]
                    place = {"offset": first, "length": last - first}
                    parts[f"p{number}"] = {"shape": [1, sizes[number]], "dim": None, **place}
            begin += sizes[number]
            number += 1
    assert number == len(sizes)
    directory = tmp_path_factory.mktemp("optimizer")
    for rank, (tensors, parts) in enumerate(files):
        metadata = {"parts": parts, "steps": dict.fromkeys(parts, 2.0), "scaler": {}}
        write_safetensors(
            directory / f"tp-000_pp-000_zero-{rank:04d}.safetensors",
            tensors,
            {key: json.dumps(value) for key, value in metadata.items()},
        )
    saved = SavedOptimizer(directory)
    for number, expected in enumerate(values):
        assert torch.equal(saved.whole(f"p{number}", "master"), expected[None])
        assert saved.steps[f"p{number}"] == 2.0


def test_slices_of_one_length_need_no_place() -> None:
    slices = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]
    assert join_slices(slices, [None, None], [3]).tolist() == [1, 2, 3]
    assert join_slices(slices[::-1], [2, 0], [2, 2]).tolist() == [[1, 2], [3, 0]]
