"""Damage to a dataset at rest, from a flipped bit to a forgery whose records all agree with each other."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.layout import sha256_hex

SHARD = 2
"""The shard that is damaged where a test does not say otherwise."""


def flip(data: bytes, at: int) -> bytes:
    """One bit of the byte at ``at`` flipped."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def record(root: Path, shard: int = SHARD) -> dict[str, Any]:
    """A commit record as plain JSON."""
    return json.loads((root / f"commits/{shard:06d}.json").read_bytes())


def rewrite(root: Path, edit: Callable[[bytes], bytes], shard: int = SHARD) -> None:
    """Edit a shard's tar in place, leaving its record as it is."""
    path = root / record(root, shard)["path"]
    path.write_bytes(edit(path.read_bytes()))


def recommit(root: Path, tar: bytes | None = None, index: pa.Table | None = None, shard: int = SHARD) -> None:
    """Forge a consistent record around other bytes: only what the bytes *say* can give the forgery away."""
    about = record(root, shard)
    if tar is not None:
        (root / about["path"]).write_bytes(tar)
        about |= {"sha256": sha256_hex(tar), "num_bytes": len(tar)}
    if index is not None:
        sink = io.BytesIO()
        pq.write_table(index, sink)
        (root / about["index_path"]).write_bytes(sink.getvalue())
        about["index_sha256"] = sha256_hex(sink.getvalue())
    (root / f"commits/{shard:06d}.json").write_text(json.dumps(about))


def members(root: Path, shard: int = SHARD) -> list[tuple[str, bytes]]:
    """Names and contents of a shard's members."""
    with tarfile.open(root / record(root, shard)["path"]) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def tar_of(entries: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o444
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def with_column(table: pa.Table, column: str, edit: Callable[[list[Any]], list[Any]]) -> pa.Table:
    """A table with one column edited."""
    at = table.schema.get_field_index(column)
    values = edit(table.column(column).to_pylist())
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def index_with(root: Path, column: str, edit: Callable[[list[Any]], list[Any]], shard: int = SHARD) -> pa.Table:
    """A shard's index with one column edited."""
    return with_column(pq.read_table(root / record(root, shard)["index_path"]), column, edit)


def reindexed(root: Path, tar: bytes, shard: int = SHARD) -> pa.Table:
    """A shard's index with the places that its samples have in another tar."""
    table = pq.read_table(root / record(root, shard)["index_path"])
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for info in archive:
            key = info.name.partition(".")[0]
            starts.setdefault(key, info.offset)
            ends[key] = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    keys = table["key"].to_pylist()
    table = with_column(table, "offset", lambda _: [starts[key] for key in keys])
    return with_column(table, "length", lambda _: [ends[key] - starts[key] for key in keys])
