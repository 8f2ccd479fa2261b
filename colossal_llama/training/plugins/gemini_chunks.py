"""How Gemini cuts a model into chunks: tensors in the model's order, each chunk sharded over all processes.

    tensors   a a a b b b b b c d d d d | e e e e e e e e e e e e e e e e | f f …
    chunks    |--- chunk -------------- |--- a larger tensor's own ----- | --- …
    shards    |-- rank 0 --|-- rank 1 --|                 "padding" is what is left at the end of a chunk

colossalai's own search begins at 32 Mi elements, and leaves a model that is smaller whole on every process.
Here a small model has several chunks too, so that on a laptop they are sharded and moved as on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from colossal_llama.training.layout import next_multiple

# Elements of the smallest chunk of a large model: large enough for collectives at full speed.
SMALLEST_CHUNK = 32 * 1024**2
# A model that is too small for chunks of that size has about so many.
FEWEST_CHUNKS = 8
_NUM_CANDIDATES = 256


def deal_tensors(sizes: Sequence[int], chunk_size: int, world_size: int) -> list[int]:
    """Elements of each chunk once tensors of `sizes` are in them, padding included.

    >>> deal_tensors([3, 5, 1, 4, 16, 2], 13, 1)
    [13, 16, 13]
    """
    chunks: list[int] = []
    room = 0
    for size in sizes:
        if size > room:
            chunks.append(next_multiple(max(size, chunk_size), world_size))
            room = chunks[-1]
        room -= size
    return chunks


def choose_chunk_size(sizes: Sequence[int], world_size: int) -> int:
    """Elements of a chunk: of sizes between the smallest and twice that, the one that pads least."""
    smallest = min(SMALLEST_CHUNK, -(-sum(sizes) // FEWEST_CHUNKS))
    step = -(-smallest // _NUM_CANDIDATES)
    candidates = {next_multiple(size, world_size) for size in range(smallest, 2 * smallest + 1, step)}
    return min(candidates, key=lambda size: (sum(deal_tensors(sizes, size, world_size)), size))


def largest_neighbours(chunks: Sequence[int]) -> int:
    """Elements of the two chunks in a row that are largest together: an operation may need both."""
    return max((one + other for one, other in pairwise(chunks)), default=sum(chunks))
