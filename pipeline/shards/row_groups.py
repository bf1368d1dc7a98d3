"""A Parquet file that is read a row group at a time, wherever it lies. Memory: the row group that was read last.

What somebody else may have damaged is one line: at opening a UserError, in a row group an OSError, as of any disk.
"""

from collections.abc import Iterator
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
from pipeline.shards.parquet_fault import DamagedParquet, reading_parquet
from pipeline.shards.storage import Storage


class RowGroups:
    """The row groups of a file. For one thread.

    Attributes:
        where: the file, for messages.
        num_rows: in all of it.
        starts: first row of each row group, and ``num_rows`` at the end.
    """

    def __init__(self, where: str, file: pq.ParquetFile, schema: pa.Schema) -> None:
        """Use :meth:`open`; this only keeps the parts."""
        self.where = where
        self.num_rows: int = file.metadata.num_rows
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self.starts: list[int] = np.cumsum([0, *lengths]).tolist()
        self._file = file
        self._schema = schema
        self._last: tuple[int, pa.Table] | None = None

    @classmethod
    def open(cls, storage: Storage, path: str, schema: pa.Schema) -> Self:
        """Open ``path`` of a storage.

        Args:
            storage: where it lies.
            path: of the file.
            schema: of the tables that are given out.

        Raises:
            UserError: it is not there, or no Parquet.
        """
        where = f"{storage.uri}/{path}"
        try:
            with reading_parquet():
                file = pq.ParquetFile(storage.reader(path), pre_buffer=False, page_checksum_verification=True)
        except FileNotFoundError:
            raise UserError(f"{where}: no such file") from None
        except DamagedParquet:
            raise UserError(f"{where}: not a Parquet file, or a damaged one") from None
        return cls(where, file, schema)

    def entry(self, key: bytes) -> bytes | None:
        """An entry of the footer."""
        return (self._file.metadata.metadata or {}).get(key)

    @property
    def has_its_columns(self) -> bool:
        """Whether the file has the columns of the schema, in its order."""
        return [(field.name, field.type) for field in self._file.schema_arrow] == [
            (field.name, field.type) for field in self._schema
        ]

    def group(self, number: int) -> pa.Table:
        """A row group. Raises OSError if it cannot be read, or holds what the schema does not allow."""
        if self._last is None or self._last[0] != number:
            self._last = None  # let the old one go before the new one comes
            try:
                with reading_parquet():
                    table = self._file.read_row_group(number, use_threads=False)
                    table.validate(full=True)  # or text that is not UTF-8 comes to light only where it is used
                self._last = number, table.cast(self._schema)  # which has no nulls
            except ValueError as error:
                raise OSError(f"{self.where}: row group {number} cannot be read: {error}") from None
        return self._last[1]

    def rows(self, start: int, stop: int) -> Iterator[pa.Table]:
        """The rows ``start <= row < stop`` in pieces. Raises IndexError unless 0 <= start <= stop <= num_rows."""
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"{self.where}: no rows {start} to {stop} among {self.num_rows}")
        for number in range(int(np.searchsorted(self.starts, start, "right")) - 1, len(self.starts) - 1):
            first = self.starts[number]
            if first >= stop:
                break
            yield self.group(number).slice(max(start - first, 0), stop - max(start, first))
