"""How often each new piece of an extended tokenizer occurs in prepared data.

Each part has the counts of its rows beside them, so those of any parts together are a sum:

    new_pieces.json   {"first_id": 32000, "end_id": 69104, "ids": [32000, 32003, …], "counts": [17, 2, …]}

Ids that do not occur are left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object, write_text_atomically

COUNTS_FILE = "new_pieces.json"
RARE_LIMITS = (10, 100)


class PieceCounter:
    """Counts the new ids among the tokens that it is shown."""

    def __init__(self, new_rows: range) -> None:
        self.new_rows = new_rows
        self.counts = np.zeros(len(new_rows), dtype=np.int64)

    def add(self, input_ids: np.ndarray) -> None:
        new = input_ids[(input_ids >= self.new_rows.start) & (input_ids < self.new_rows.stop)]
        self.counts += np.bincount(new - self.new_rows.start, minlength=len(self.counts))

    def write(self, directory: Path) -> None:
        """Leaves the counts in the directory of a part."""
        seen = np.flatnonzero(self.counts)
        value = {
            "first_id": self.new_rows.start,
            "end_id": self.new_rows.stop,
            "ids": (seen + self.new_rows.start).tolist(),
            "counts": self.counts[seen].tolist(),
        }
        write_text_atomically(directory / COUNTS_FILE, json.dumps(value) + "\n")


def read_piece_counts(parts: Sequence[Path], new_rows: range) -> np.ndarray | None:
    """Occurrences of each new id in these parts together, int64 [len(new_rows)].

    None where a part has no counts, or those of other ids: an earlier version prepared it.
    """
    counts = np.zeros(len(new_rows), dtype=np.int64)
    for part in parts:
        path = part / COUNTS_FILE
        if not path.exists():
            return None
        value = read_json_object(path)
        try:
            if (value["first_id"], value["end_id"]) != (new_rows.start, new_rows.stop):
                return None
            counts[np.array(value["ids"], dtype=np.int64) - new_rows.start] += np.array(
                value["counts"], dtype=np.int64
            )
        except (KeyError, TypeError, ValueError, IndexError):
            raise UserError(f"{path}: not what a prepare script writes; prepare the data again") from None
    return counts


def summarise_counts(counts: np.ndarray) -> dict[str, Any]:
    """How many new pieces never occur, and how many are rare; the smaller groups are part of the larger."""
    return {
        "pieces": len(counts),
        "occurrences": int(counts.sum()),
        "never": int((counts == 0).sum()),
        **{f"under_{limit}": int((counts < limit).sum()) for limit in RARE_LIMITS},
    }
