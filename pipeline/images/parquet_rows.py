"""The images of Parquet tables. The order is that of the tables' names, then that of the rows.

A row group is the smallest piece that Parquet can read: the last few are held, which bounds the memory if their writer
was reasonable (Hugging Face's are 100 to 1,000 images).
"""

import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.encode_schema import ParquetSource
from configs.errors import UserError, did_you_mean
from pipeline.images.files import files_of
from pipeline.images.source import Source, UnreadableImage
from pipeline.images.source_table import SourceImage
from pipeline.prompts import normalise
from pipeline.shards.parquet_fault import DamagedParquet, reading_parquet

_ROW_GROUPS_HELD = 3


class ParquetRows(Source):
    """See the module.

    Args:
        config: the tables and their columns.
    """

    def __init__(self, config: ParquetSource) -> None:
        super().__init__()
        self._config = config
        self._storage, self._files = files_of(config.path, ".parquet")
        self._tables: dict[str, pq.ParquetFile] = {}
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def entries(self) -> Iterator[SourceImage]:
        """The images, each with its class and its prompt."""
        config = self._config
        columns = [config.image_column, *filter(None, (config.label_column, config.caption_column))]
        for file in self._files:
            with self._lock, self._reading(file, "not a Parquet file, or a damaged one"):
                schema, num_groups = self._table(file).schema_arrow, self._table(file).num_row_groups
            names = schema.names
            for column in columns:
                if column not in names:
                    hint = did_you_mean(column, names)
                    raise UserError(f"{self._storage.uri}/{file}: no column {column}{hint}")
            if config.caption_column and not _is_text(found := schema.field(config.caption_column).type):
                raise UserError(f"{self._storage.uri}/{file}: {config.caption_column} holds {found}, not texts")
            row = 0
            for group in range(num_groups):
                for size, label, prompt in zip(*self._columns(file, group), strict=True):
                    label = self._label(file, row, label)
                    fault = "is missing" if size is None else ""
                    yield SourceImage(f"{file}#{row}", size or 0, file, row, label, prompt, fault=fault)
                    row += 1

    def read(self, image: SourceImage) -> bytes:
        """The bytes of an image file."""
        with self._lock, self._reading(image.file, f"row {image.at} cannot be read"):
            metadata = self._table(image.file).metadata
            starts = np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))])
            group = int(np.searchsorted(starts, image.at, "right")) - 1
            if group >= metadata.num_row_groups:
                raise FileNotFoundError(image.name)
            data = self._images(image.file, group)[image.at - int(starts[group])].as_py()
        if data is None:
            raise UnreadableImage("is missing")
        return data

    def _columns(self, file: str, group: int) -> tuple[list[int | None], list[Any], list[str]]:
        """Bytes of each image, class and prompt of a row group."""
        config = self._config
        others = [name for name in (config.label_column, config.caption_column) if name]
        with self._lock, self._reading(file, f"row group {group} cannot be read"):
            images = self._images(file, group)
            table = self._table(file).read_row_group(group, columns=others, use_threads=False) if others else None
            sizes: list[int | None] = pc.binary_length(images).to_pylist()
            labels = table[config.label_column].to_pylist() if table and config.label_column else [-1] * len(sizes)
            texts = table[config.caption_column].to_pylist() if table and config.caption_column else [""] * len(sizes)
        return sizes, labels, [normalise(str(text or "")) for text in texts]

    def _label(self, file: str, row: int, label: Any) -> int:
        if type(label) is not int or label < (-1 if self._config.label_column is None else 0):
            raise UserError(
                f"{self._storage.uri}/{file}: {self._config.label_column} of row {row} is {label!r}, not a class from 0"
            )
        return label

    def _images(self, file: str, group: int) -> pa.ChunkedArray:
        """The encoded images of a row group, binary; to be called with the lock held."""
        if (file, group) in self._groups:
            self._groups.move_to_end((file, group))
            return self._groups[file, group]
        while len(self._groups) >= _ROW_GROUPS_HELD:
            self._groups.popitem(last=False)
        column = self._config.image_column
        array = self._table(file).read_row_group(group, columns=[column], use_threads=False)[column]
        if pa.types.is_struct(array.type) and array.type.get_field_index("bytes") >= 0:
            array = pa.chunked_array(
                [chunk.field("bytes") for chunk in array.chunks], type=array.type.field("bytes").type
            )
        if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
            raise UserError(f"{self._storage.uri}/{file}: {column} holds {array.type}, not bytes of image files")
        self._groups[file, group] = array
        return array

    def _table(self, file: str) -> pq.ParquetFile:
        """An open table; to be called with the lock held, and as :meth:`_reading` says."""
        if file not in self._tables:
            self._tables[file] = pq.ParquetFile(self._storage.reader(file), pre_buffer=False)
        return self._tables[file]

    @contextmanager
    def _reading(self, file: str, what: str) -> Generator[None]:
        """Read from a table in the body. Raises UserError if its bytes are damaged, or a text is no UTF-8."""
        try:
            with reading_parquet():
                yield
        except DamagedParquet as error:
            raise UserError(f"{self._storage.uri}/{file}: {what} ({error}); copy or make the file again") from None


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)
