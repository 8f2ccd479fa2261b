"""The rows that an extended model has more than its base: their pieces, and how far they moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_llama.evaluation.scoring import find_rows_beyond_base
from colossal_llama.tokenizer.token_bytes import TokenBytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from colossal_llama.model.model_extension import ModelLayout


@dataclass(frozen=True)
class NewPieces:
    """The tokens that an extended tokenizer has more, in the order of ids.

    Attributes:
        texts: of each id.
        replaced: the base's tokens of the same text.
    """

    texts: dict[int, str]
    replaced: dict[int, list[int]]


@dataclass(frozen=True)
class EmbeddingRows:
    """Some rows of a model's matrices, [rows, width]; `output` is None where they are tied."""

    input: torch.Tensor
    output: torch.Tensor | None


def find_new_pieces(base: PreTrainedTokenizerFast, extended: PreTrainedTokenizerFast) -> NewPieces | None:
    """None where a tokenizer does not extend the other; of equal ones, no pieces."""
    vocabulary = extended.get_vocab()
    new_ids = find_rows_beyond_base(base.get_vocab(), vocabulary, 0, 0)
    if new_ids is None:
        return None
    table = TokenBytes.of_tokenizer(extended)
    names = {token_id: token for token, token_id in vocabulary.items()}
    texts, replaced = {}, {}
    for token_id in new_ids:
        text = names[token_id]
        if table is not None:
            text = table.readable(token_id).replace(" ", "▁")
        texts[token_id] = text
        replaced[token_id] = [token.id for token in base.backend_tokenizer.model.tokenize(names[token_id])]
    return NewPieces(texts, replaced)


def mean_rows(base: EmbeddingRows, replaced: Sequence[Sequence[int]]) -> EmbeddingRows:
    """The rows that init_model.py makes by default, in the dtype that it writes them in."""
    from colossal_llama.model.initializations import mean

    return EmbeddingRows(
        mean(base.input, replaced).to(base.input.dtype),
        None if base.output is None else mean(base.output, replaced).to(base.output.dtype),
    )


def read_rows(directory: Path, flag: str, rows: Sequence[int] | None = None) -> EmbeddingRows:
    """Rows of the matrices of a model on disk, without loading the rest of it; None: all rows.

    Raises:
        UserError: it has no such matrices, or not that many rows.
    """
    from colossal_llama.model.model_extension import OUTPUT_HEAD, check_embeddings, read_layout
    from colossal_llama.model.weight_files import find_shards
    from colossal_llama.utils.errors import UserError

    layout = read_layout(find_shards(directory, flag))
    num_rows, width = check_embeddings(layout, layout.find(OUTPUT_HEAD) is None, directory)
    rows = range(num_rows) if rows is None else rows
    if rows[-1] >= num_rows:
        raise UserError(
            f"{flag} {directory}: has {num_rows:,} rows, and no row {rows[-1]:,}; give the model as "
            "init_model.py extended it"
        )
    return _read_span(layout, rows, width)


def _read_span(layout: ModelLayout, rows: Sequence[int], width: int) -> EmbeddingRows:
    from colossal_llama.model.model_extension import EMBEDDING, OUTPUT_HEAD
    from colossal_llama.model.weight_files import open_shard

    found: dict[str, torch.Tensor] = {}
    for path, tensors in layout.shards.items():
        shard = open_shard(path)
        for name in (EMBEDDING, OUTPUT_HEAD):
            if name in tensors:
                span = shard.read(name, rows[0] * width, (rows[-1] + 1) * width).view(-1, width)
                found[name] = span[[row - rows[0] for row in rows]]
        shard.close()
    return EmbeddingRows(found[EMBEDDING], found.get(OUTPUT_HEAD))
