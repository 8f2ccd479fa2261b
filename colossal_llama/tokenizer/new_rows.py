"""Which rows of an extended model are new: what `vocabulary_extension.json` says of a tokenizer."""

from __future__ import annotations

from pathlib import Path

from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json_object


def find_new_rows(directory: Path) -> range:
    """The ids that an extension added to a tokenizer; empty where its vocabulary was not extended.

    Raises:
        UserError: the report of the extension is damaged.
    """
    path = directory / REPORT_FILE
    return _read_ids(path) if path.exists() else range(0)


def read_new_ids(report: Path) -> range:
    """The same from the report file itself.

    Raises:
        UserError: naming the file, when it is no such report, or nothing was added.
    """
    ids = _read_ids(report)
    if not ids:
        raise UserError(f"{report}: says that no piece was added to the {ids.start:,} of the source")
    return ids


def _read_ids(report: Path) -> range:
    """The ids after the source's, as the report counts them."""
    counts = read_json_object(report).get("counts")
    counts = counts if isinstance(counts, dict) else {}
    sizes = [counts.get(f"{name}_vocabulary_size") for name in ("source", "target")]
    if not all(isinstance(size, int) for size in sizes):
        raise UserError(
            f"{report}: does not say which ids are new (`counts` lacks the sizes of the two vocabularies); "
            "copy the file that init_tokenizer.py wrote"
        )
    return range(*sizes)
