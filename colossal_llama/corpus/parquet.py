"""Reading the rows of Parquet files. A row is a record, its number is the record's line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from colossal_llama.corpus.storage import open_range
from colossal_llama.utils.errors import UserError

SUFFIX = ".parquet"
BATCH_ROWS = 256
BUFFER_BYTES = 1 << 20


def read_rows(
    path: str, size: int, start: int, end: int, fields: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of the row groups that start at the bytes `start` ≤ … < `end` of a file.

    Args:
        size: of the file, in bytes.
        fields: the columns that are wanted; all where the file has none of them, or none is named.

    Raises:
        UserError: the file is damaged, or is something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_range(path, size, size) as file:
        try:
            # Read as it is decoded: a row group may be large.
            parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER_BYTES)
            columns = [name for name in fields if name in parquet.schema_arrow.names] or None
            groups = [
                number
                for number in range(parquet.num_row_groups)
                if start <= _first_byte(parquet.metadata.row_group(number)) < end
            ]
            for batch in (
                parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns) if groups else ()
            ):
                yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(
                f"{path}: not a Parquet file, or a damaged one: {error}; write it again"
            ) from None


def _first_byte(group: Any) -> int:
    column = group.column(0)
    offset = column.data_page_offset
    return min(offset, column.dictionary_page_offset) if column.has_dictionary_page else offset
