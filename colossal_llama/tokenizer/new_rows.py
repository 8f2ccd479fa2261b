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
    if not path.exists():
        return range(0)
    counts = read_json_object(path).get("counts")
    try:
        rows = range(counts["source_vocabulary_size"], counts["target_vocabulary_size"])
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: does not say which rows are new; copy the file that init_tokenizer.py wrote"
        ) from None
    return rows
