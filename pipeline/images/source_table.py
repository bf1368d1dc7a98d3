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
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError
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


@dataclass(frozen=True)
class SourcesInfo:
    """What a list says about itself in its footer."""

    format_version: int
    """SOURCES_VERSION of its writer."""
    digest: str
    """Identity of the images, as 64 hex digits."""
    count: int
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
        info = SourcesInfo(SOURCES_VERSION, digest.hexdigest(), count)
        writer.add_key_value_metadata({_INFO_KEY: json.dumps(asdict(info))})
    return info


class SourceTable:
    """Random access to a list, wherever it lies; holds one row group in memory. For one thread."""

    def __init__(self, path: str, info: SourcesInfo, file: pq.ParquetFile) -> None:
        """Use :meth:`open`; this only keeps the parts."""
        self.digest = info.digest
        """Identity of the images, as the list's footer states it."""
        self.num_images = info.count
        """Number of images."""
        self._path = path
        self._file = file
        lengths = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *lengths])
        self._group: tuple[int, pa.Table] | None = None

    @classmethod
    def open(cls, storage: Storage, path: str) -> Self:
        """Open the list ``path`` of a storage. Raises UserError if there is none or it is not such a list."""
        where = f"{storage.uri}/{path}"
        try:
            file = pq.ParquetFile(storage.reader(path), pre_buffer=False, page_checksum_verification=True)
            entry = (file.metadata.metadata or {})[_INFO_KEY]
        except FileNotFoundError:
            raise UserError(f"{where}: no such file") from None
        except (pa.ArrowInvalid, KeyError):
            raise UserError(f"{where}: not a list of images, or a damaged one") from None
        info = json.loads(entry)
        if info["format_version"] != SOURCES_VERSION:
            raise UserError(f"{where}: made by another version (format {info['format_version']}); use that one")
        return cls(where, SourcesInfo(**info), file)

    def rows(self, start: int, stop: int) -> list[SourceImage]:
        """The images ``start <= i < stop``."""
        images: list[SourceImage] = []
        for group in range(int(np.searchsorted(self._starts, start, "right")) - 1, self._file.num_row_groups):
            first = int(self._starts[group])
            if first >= stop:
                break
            part = self._row_group(group).slice(max(start - first, 0), stop - max(start, first))
            images += [SourceImage(**row) for row in part.to_pylist()]
        return images

    def verify(self) -> None:
        """Read the whole list; raise UserError unless it is the one that the digest was made of."""
        digest = hashlib.sha256()
        for start, stop in zip(self._starts[:-1], self._starts[1:], strict=True):
            digest.update(_canonical(self.rows(int(start), int(stop))))
        if digest.hexdigest() != self.digest:
            raise UserError(f"{self._path}: the images are not those of its digest; run encode_images.py again")

    def _row_group(self, group: int) -> pa.Table:
        if self._group is None or self._group[0] != group:
            self._group = None  # let the old one go before the new one comes
            try:
                self._group = group, self._file.read_row_group(group, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"{self._path}: row group {group} cannot be read: {error}") from error
        return self._group[1]


def _canonical(images: Iterable[SourceImage]) -> bytes:
    rows = ([image.name, image.sha256, image.label, image.prompt, image.fault] for image in images)
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
