"""What `--dry_run` says of an extended vocabulary: pieces that the data hardly has, and what it all buys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colossal_llama.dataset.piece_counts import RARE_LIMITS, read_piece_counts, summarise_counts
from colossal_llama.tokenizer.base_vocabulary import find_replaced_tokens
from colossal_llama.tokenizer.extension_bill import ExtensionBill, format_bill, make_bill
from colossal_llama.tokenizer.new_rows import find_new_rows
from colossal_llama.tokenizer.token_bytes import TokenBytes
from colossal_llama.tokenizer.tokenizer_files import FAST_FILE
from colossal_llama.training.data.prepared_rows import PreparedDataset
from colossal_llama.utils.files import read_json_object
from colossal_llama.utils.messages import join_names

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from colossal_llama.training.data.rows import RowDataset

MAX_NAMED_PIECES = 5


@dataclass(frozen=True)
class ExtensionReport:
    """New pieces of a model's tokenizer in the training data.

    Attributes:
        counts: occurrences of each new id in one epoch; None where an earlier version prepared the data.
        names: the new pieces, in the order of their ids.
        bill: None without counts.
    """

    new_rows: range
    counts: np.ndarray | None
    names: list[str]
    bill: ExtensionBill | None

    def rare_pieces(self) -> str | None:
        """A warning of pieces that the data hardly has; None if it has enough of all of them."""
        if self.counts is None:
            return None
        summary, (few, _) = summarise_counts(self.counts), RARE_LIMITS
        if not summary[f"under_{few}"]:
            return None
        rarest = [self.names[i] for i in np.argsort(self.counts, kind="stable")[: summary[f"under_{few}"]]]
        limits = ", ".join(f"{summary[f'under_{limit}']:,} under {limit} times" for limit in RARE_LIMITS)
        return (
            f"--dataset: of {summary['pieces']:,} new pieces, {summary['never']:,} never occur, {limits} "
            f"({join_names(rarest, MAX_NAMED_PIECES)}); this run leaves their rows nearly as they are: "
            "unless an earlier stage trained them, leave such pieces out of the vocabulary, or train on data "
            "that has them"
        )

    def describe(self) -> str:
        if self.bill is None:
            return (
                "New pieces in the data: not counted, an earlier version prepared it; prepare it again to "
                "see what the extension buys"
            )
        return format_bill(f"{len(self.new_rows):,} new pieces, on --dataset, about", self.bill)


def report_extension(pretrained: str, config: LlamaConfig, dataset: RowDataset) -> ExtensionReport | None:
    """The report for a local model; None where its vocabulary was not extended, or its data is made up."""
    directory = Path(pretrained)
    if not directory.is_dir() or not isinstance(dataset, PreparedDataset):
        return None
    new_rows = find_new_rows(directory)
    if not new_rows or not (directory / FAST_FILE).is_file():
        return None
    table = TokenBytes.of_value(read_json_object(directory / FAST_FILE))
    names = [_name(table, token_id) for token_id in new_rows]
    counts = read_piece_counts(dataset.paths, new_rows)
    bill = None
    if counts is not None:
        replaced = find_replaced_tokens(directory, new_rows)
        more = sum(int(n) * (len(replaced[i]) - 1) for i, n in zip(new_rows, counts, strict=True) if n)
        tokens = dataset.num_tokens
        bill = make_bill(
            config,
            new_rows.start,
            config.vocab_size,
            tokens + more,
            tokens,
            len(new_rows),
            int(counts.sum()),
        )
    return ExtensionReport(new_rows, counts, names, bill)


def _name(table: TokenBytes | None, token_id: int) -> str:
    if table is None or token_id >= len(table.contents):
        return f"id {token_id}"
    return table.readable(token_id)
