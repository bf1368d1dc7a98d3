"""One shard from samples to its commit.

    local temporary tar -> close, fsync -> reopen, count, sha256 -> upload tar and index under their content's names
    -> create-only commit record

A shard exists from the moment its commit record does, and not before; whatever else lies around is unreferenced and
harmless. The commit record is created, never replaced: of several writers of one shard the first wins, and the others
delete nothing (the winner may have named the same file) and take its record as theirs.

Bytes are reproducible: members in a fixed order, no clock, no user, no host in the tar.
"""

import hashlib
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from configs.encode_schema import ImagesSpec
from configs.errors import RunStopped
from configs.schema import PairsSpec
from pipeline.shards.layout import ImageRow, IndexRow, Row, commit_path, index_path, sha256_hex, shard_path
from pipeline.shards.records import Commit, Rejection, Timing
from pipeline.shards.storage import Storage

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("prompt_truncated", pa.bool_()),
        ("seed", pa.int64()),
        ("noise_digest", pa.string()),
        ("guidance_scale", pa.float32()),
        ("made_in_float32", pa.bool_()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Of pairs."""

IMAGES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("name", pa.string()),
        ("source_sha256", pa.string()),
        ("label", pa.int32()),
        ("prompt", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
"""Of real images."""


class DamagedShard(RunStopped):
    """A shard whose bytes are not what was written or recorded: names the shard and what differs."""


@dataclass(frozen=True)
class WrittenShard:
    """A finished local tar: its path, the sha256 and number of its bytes, and its index."""

    path: Path
    sha256: str
    num_bytes: int
    rows: list[Row]


class ShardWriter:
    """Writes one tar on a local disk. Leaving the context removes the file, whatever happened.

    Args:
        path: the temporary tar; must not exist.
    """

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # brings torch along, which status.py can do without

        self._path = path
        self._file = path.open("xb")
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False)
        self._rows: list[Row] = []
        self._num_stored = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a full disk refuses the buffered rest once more; that error is on its way already
            self._tar.close()
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, row: Row, members: Mapping[str, bytes]) -> None:
        """Append a sample: its ``members`` by suffix, in suffix order, under the row's key."""
        start = self._tar.tarstream.offset
        self._tar.write({"__key__": row.key, **members})
        length = self._tar.tarstream.offset - start
        self._rows.append(replace(row, row=self._num_stored, offset=start, length=length))
        self._num_stored += 1

    def reject(self, row: Row) -> None:
        """List a sample that is not stored; the row's reason says why."""
        self._rows.append(replace(row, row=-1, offset=-1, length=0))

    def finish(self) -> WrittenShard:
        """Close, flush to the disk, read back and count.

        Raises:
            DamagedShard: what can be read back is not what was added.
            OSError: the disk is full.
        """
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        expected = [row.key for row in self._rows if row.status == "ok"]
        with tarfile.open(self._path) as tar:
            found = list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))
        if found != expected:
            raise DamagedShard(f"{self._path}: {len(expected)} samples were written, {len(found)} can be read back")
        with self._path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return WrittenShard(self._path, sha256, self._path.stat().st_size, self._rows)


def index_schema(spec: PairsSpec | ImagesSpec) -> pa.Schema:
    """Columns of the indices of a dataset."""
    return IMAGES_SCHEMA if isinstance(spec, ImagesSpec) else INDEX_SCHEMA


def encode_index(rows: Sequence[Row]) -> bytes:
    """The index rows, all of pairs or all of images, as one Parquet file."""
    schema = IMAGES_SCHEMA if rows and isinstance(rows[0], ImageRow) else INDEX_SCHEMA
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=schema)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def commit_shard(storage: Storage, fingerprint: str, shard: int, written: WrittenShard, timing: Timing) -> Commit:
    """Upload a written shard and its index, and create its commit record.

    Returns:
        The commit record that stands: ours, or that of whoever came first.
    """
    index = encode_index(written.rows)
    index_sha256 = sha256_hex(index)
    commit = Commit(
        shard=shard,
        fingerprint=fingerprint,
        path=shard_path(fingerprint, shard, written.sha256),
        sha256=written.sha256,
        num_bytes=written.num_bytes,
        index_path=index_path(shard, index_sha256),
        index_sha256=index_sha256,
        num_samples=sum(row.status == "ok" for row in written.rows),
        num_truncated=sum(
            row.status == "ok" and isinstance(row, IndexRow) and row.prompt_truncated for row in written.rows
        ),
        rejected=[Rejection(key=row.key, reason=row.reason) for row in written.rows if row.status == "rejected"],
        timing=timing,
    )
    storage.upload(commit.path, written.path)
    storage.write(commit.index_path, index)
    if storage.create(commit_path(shard), commit.to_json()):
        return commit
    return Commit.from_json(storage.read(commit_path(shard)), commit_path(shard))
