"""Prompts as they come: .txt, .csv, .jsonl and .parquet files, read as a stream.

Every reader yields one string, or None for a null, per row of the file and leaves nothing out: a blank line is a row.
What cannot be read is a :class:`UserError` with file and line, never a skipped row. Text is UTF-8, with or without a
byte order mark. Memory is bounded by one line of at most 16 MiB, or one row group of a Parquet file.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import PurePath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError, did_you_mean
from configs.json_text import parse_json
from pipeline.shards.parquet_fault import DamagedParquet, reading_parquet
from pipeline.shards.storage import Storage

_MAX_LINE_BYTES = 16 << 20
_BATCH_ROWS = 16_384


def read_prompts(path: str, column: str) -> Iterator[str | None]:
    """Yield the text of every row of a file, in order.

    Args:
        path: URI or local path; its suffix names the format.
        column: column (csv, parquet) or key (jsonl) with the text; not used for txt.

    Raises:
        UserError: the file does not exist, or is not what its suffix says, or a row is not text in UTF-8.
    """
    reader = _READERS.get(PurePath(path).suffix.lower())
    if reader is None:
        raise UserError(f"{path}: prompts are read from {', '.join(_READERS)}; convert the file to one of these")
    yield from reader(open_source(path), path, column)


def open_source(path: str) -> BinaryIO:
    """Open a file that the user named, by URI or local path, for reading. Raises UserError if there is none."""
    storage, name = Storage.of_file(path)
    try:
        return storage.reader(name)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def read_lines(file: BinaryIO, path: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of a text file. Raises UserError where it is not UTF-8."""
    for number in count(1):
        line = file.readline(_MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > _MAX_LINE_BYTES:
            raise UserError(f"{path}:{number}: a line of more than {_MAX_LINE_BYTES} bytes; this is no list of prompts")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; convert the file to UTF-8"
            ) from None


def _read_txt(file: BinaryIO, path: str, column: str) -> Iterator[str]:
    for _, line in read_lines(file, path):
        yield line


def _read_csv(file: BinaryIO, path: str, column: str) -> Iterator[str]:
    csv.field_size_limit(_MAX_LINE_BYTES)  # of this process: Python's own limit is a prompt of 131,072 characters
    rows = csv.reader((line for _, line in read_lines(file, path)), strict=True)
    try:
        header = next(rows, [])
        index = _index(column, header, path)
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(f"{path}:{rows.line_num}: {len(row)} fields, the header has {len(header)}")
            yield row[index] if row else ""
    except csv.Error as error:  # an open quote is noticed here too: it makes one field of all that follows
        raise UserError(f"{path}:{rows.line_num}: {error}; look for a quote that is not closed") from None


def _read_jsonl(file: BinaryIO, path: str, column: str) -> Iterator[str | None]:
    for number, line in read_lines(file, path):
        if not line.strip():
            yield None
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg} at character {error.pos + 1})") from None
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        if column not in row:
            _index(column, list(row), f"{path}:{number}")
        text = row[column]
        if text is not None and not isinstance(text, str):
            raise UserError(f"{path}:{number}: {column} is {json.dumps(text)[:40]}, not text")
        if text is not None and not _encodable(text):
            raise UserError(f"{path}:{number}: {column} holds half of a surrogate pair, which is no character")
        yield text


def _read_parquet(file: BinaryIO, path: str, column: str) -> Iterator[str | None]:
    try:
        with reading_parquet():
            table = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
            columns = table.schema_arrow
    except DamagedParquet:
        raise UserError(f"{path}: not a Parquet file, or a damaged one") from None
    kind = columns.field(_index(column, columns.names, path)).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(text) or pa.types.is_large_string(text) or pa.types.is_null(text)):
        raise UserError(f"{path}: column {column} holds {kind}, not text")
    first = 0
    batches = table.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False)
    while True:
        try:
            with reading_parquet():
                if (batch := next(batches, None)) is None:
                    return
                texts = batch.column(0).to_pylist()
        except DamagedParquet as error:
            raise UserError(f"{path}: rows from {first} on cannot be read ({error}); make the file again") from None
        first += len(batch)
        yield from texts


_READERS: dict[str, Callable[[BinaryIO, str, str], Iterable[str | None]]] = {
    ".txt": _read_txt,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}


def _index(column: str, found: list[str], where: str) -> int:
    if column in found:
        return found.index(column)
    hint = did_you_mean(column, found) or "; name one of them by prompts.column"
    raise UserError(f"{where}: no column {column} among {', '.join(found[:20]) or 'none'}{hint}")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
