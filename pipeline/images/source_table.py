"""The list of the images that a dataset was made of: one row an image, in the order of the samples.

    sources.parquet    name, sha256, num_bytes, label, prompt, fault, file, at

Sample i is row i. ``name`` to ``fault`` are what the image is; ``file`` and ``at`` say where its source has it, and may
change when the same images lie elsewhere. What identifies a list is

    digest = sha256( for every row in order:  [name, sha256, label, prompt, fault] as JSON, LF )

with the separators ``", "``, ASCII only. The footer's ``potstill.sources`` entry is the JSON of :class:`SourcesInfo`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import PositiveInt, ValidationError

from configs.errors import UserError
from configs.json_text import parse_json
from configs.schema import Model
from pipeline.shards.row_groups import RowGroups
from pipeline.shards.storage import Storage

SOURCES_VERSION = 1
"""Version of the list's layout; a reader refuses any other."""
_INFO_KEY = b"potstill.sources"
_ROW_GROUP = 16_384


@dataclass(frozen=True)
class SourceImage:
    """An image of a source.

    Attributes:
        name: path of the image in its source, with forward slashes.
        num_bytes: of the image file.
        file: which file of the source it lies in; empty if the source is one file.
        at: where in the file: a byte offset, or the number of a row; 0 if its name says it all.
        label: number of its class, -1 without one.
        prompt: its caption, or the name of its class, or nothing.
        sha256: of the image file's bytes; empty if they cannot be read.
        fault: why its bytes cannot be read; empty if they can.
    """

    name: str
    num_bytes: int
    file: str = ""
    at: int = 0
    label: int = -1
    prompt: str = ""
    sha256: str = ""
    fault: str = ""


_TYPES = {str: pa.string(), int: pa.int64()}
_SCHEMA = pa.schema([pa.field(field.name, _TYPES[field.type], False) for field in fields(SourceImage)])  # pyright: ignore


class SourcesInfo(Model):
    """What a list says about itself in its footer."""

    format_version: int
    """SOURCES_VERSION of its writer."""
    digest: str
    """Identity of the images, as 64 hex digits."""
    count: PositiveInt
    """Images in the list."""


def write_source_table(path: Path, images: Iterable[SourceImage]) -> SourcesInfo:
    """Write a list to a local file; memory holds one row group.

    Raises:
        UserError: there is no image.
    """
    digest, count = hashlib.sha256(), 0
    with pq.ParquetWriter(path, _SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        rows = iter(images)
        while group := list(islice(rows, _ROW_GROUP)):
            digest.update(_canonical(group))
            count += len(group)
            writer.write_table(pa.Table.from_pylist([asdict(image) for image in group], schema=_SCHEMA))
        info = SourcesInfo(format_version=SOURCES_VERSION, digest=digest.hexdigest(), count=count)
        writer.add_key_value_metadata({_INFO_KEY: json.dumps(info.model_dump())})
    return info


class SourceTable:
    """Random access to a list, wherever it lies; holds one row group in memory. For one thread."""

    def __init__(self, info: SourcesInfo, file: RowGroups) -> None:
        """Use :meth:`open`; this only keeps the parts."""
        self.digest = info.digest
        """Identity of the images, as the list's footer states it."""
        self.num_images = info.count
        """Number of images."""
        self._file = file

    @classmethod
    def open(cls, storage: Storage, path: str) -> Self:
        """Open the list ``path`` of a storage. Raises UserError if there is none or it is not such a list."""
        file = RowGroups.open(storage, path, _SCHEMA)
        entry = file.entry(_INFO_KEY)
        if entry is None:
            raise UserError(f"{file.where}: not a list of images; run encode_images.py again")
        try:
            version = parse_json(entry)["format_version"]
            if version != SOURCES_VERSION:
                raise UserError(f"{file.where}: made by another version (format {version}); use that one")
            info = SourcesInfo.model_validate_json(entry)
        except (ValueError, KeyError, TypeError, ValidationError):
            raise UserError(f"{file.where}: its footer is damaged; run encode_images.py again") from None
        if info.count != file.num_rows or not file.has_its_columns:
            raise UserError(
                f"{file.where}: its rows or columns are not those of its footer; run encode_images.py again"
            )
        return cls(info, file)

    def rows(self, start: int, stop: int) -> list[SourceImage]:
        """The images ``start <= i < stop``; IndexError unless 0 <= start <= stop <= n."""
        return [SourceImage(**row) for part in self._file.rows(start, stop) for row in part.to_pylist()]

    def verify(self) -> None:
        """Read the whole list; raise UserError unless it is the one that the digest was made of."""
        digest = hashlib.sha256()
        for start, stop in pairwise(self._file.starts):
            digest.update(_canonical(self.rows(start, stop)))
        if digest.hexdigest() != self.digest:
            raise UserError(f"{self._file.where}: the images are not those of its digest; run encode_images.py again")


def _canonical(images: Iterable[SourceImage]) -> bytes:
    rows = ([image.name, image.sha256, image.label, image.prompt, image.fault] for image in images)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
