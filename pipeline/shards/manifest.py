"""The manifest: all commits and all index rows of a finished dataset in a few large Parquet files.

Written once, when every shard is in; derived from the commit records and the indices they name and nothing else, so it
can be deleted and written again. Memory: all commit records, about 1 kB each, and one part of the sample table.

``SEALED.json`` comes last. Its ``content_sha256`` is the sha256 over the shards' sha256 in order: it names the very
bytes, where the fingerprint names the intention.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import SEALED, SHARDS_TABLE, key, samples_table, sha256_hex
from pipeline.shards.parallel import parallel_map
from pipeline.shards.parquet_fault import DamagedParquet, reading_parquet
from pipeline.shards.records import Commit
from pipeline.shards.writer import DamagedShard, index_schema

ROWS_PER_PART = 1_000_000
_PARALLEL_READS = 16

SHARDS_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("num_bytes", pa.int64()),
        ("num_samples", pa.int32()),
        ("num_truncated", pa.int32()),
        ("num_rejected", pa.int32()),
        ("first_key", pa.string()),
        ("last_key", pa.string()),
        ("index_path", pa.string()),
        ("index_sha256", pa.string()),
        ("fingerprint", pa.string()),
        ("attempt", pa.int32()),
        ("host", pa.string()),
        ("device", pa.string()),
        ("started", pa.string()),
        ("sample_seconds", pa.float64()),
        ("total_seconds", pa.float64()),
        ("code_revision", pa.string()),
        ("versions", pa.string()),
    ]
)


def write_manifest(dataset: Dataset) -> dict[str, Any]:
    """Write ``manifest/``; returns what ``SEALED.json`` is to say.

    Raises:
        DamagedShard: a shard is missing, or an index is not the one its commit record names.
    """
    storage = dataset.storage
    commits = read_commits(dataset, range(dataset.run.num_shards))  # by name: a listing may be late
    missing = dataset.run.num_shards - len(commits)
    if missing:
        raise DamagedShard(f"{storage.uri}: {missing} of {dataset.run.num_shards} shards have no commit record")
    storage.write(SHARDS_TABLE, _parquet(shards_table(dataset, commits)))
    num_parts = 0
    for num_parts, part in enumerate(_parts(read_indices(dataset, commits)), start=1):
        storage.write(samples_table(num_parts - 1), _parquet(part))
    written = {SHARDS_TABLE, *map(samples_table, range(num_parts))}
    for info in list(storage.list("manifest/")):  # of an earlier manifest with more parts: a glob would find them
        if info.path not in written:
            storage.delete(info.path)
    return summary(dataset, commits, num_parts)


def summary(dataset: Dataset, commits: list[Commit], num_parts: int) -> dict[str, Any]:
    """What ``SEALED.json`` says of a dataset with these commits, in order, and so many parts of the sample table."""
    content = hashlib.sha256("\n".join(commit.sha256 for commit in commits).encode()).hexdigest()
    rejected: Counter[str] = sum((commit.rejected_by_reason for commit in commits), Counter[str]())
    return {
        "fingerprint": dataset.run.fingerprint,
        "content_sha256": content,
        "num_shards": len(commits),
        "num_samples": sum(commit.num_samples for commit in commits),
        "num_truncated": sum(commit.num_truncated for commit in commits),
        "num_rejected": rejected.total(),
        "rejected_by_reason": dict(rejected),
        "num_bytes": sum(commit.num_bytes for commit in commits),
        "device_seconds": round(sum(commit.timing.sample_seconds for commit in commits), 3),
        "sample_tables": num_parts,
    }


def seal(dataset: Dataset, summary: dict[str, Any]) -> None:
    """Write ``SEALED.json``: from here on the dataset is finished."""
    dataset.storage.write(SEALED, json.dumps(summary, indent=1).encode())


def read_commits(dataset: Dataset, shards: Iterable[int] | None = None) -> list[Commit]:
    """The commit records of some shards, those that exist, in order.

    Args:
        dataset: the dataset.
        shards: numbers, increasing; None: those that a listing names.

    Raises:
        DamagedRecord: one is not what was written.
    """
    numbers = sorted(dataset.committed()) if shards is None else shards
    commits = parallel_map(dataset.commit, numbers, _PARALLEL_READS)
    return [commit for commit in commits if commit is not None]


def read_index(dataset: Dataset, commit: Commit) -> pa.Table:
    """The index of one shard, checked against its commit record.

    Raises:
        DamagedShard: it is missing, its sha256 or schema differ, or it is no Parquet file.
    """
    where = f"shard {commit.shard}: {commit.index_path}"
    try:
        data = dataset.storage.read(commit.index_path)
    except FileNotFoundError:
        raise DamagedShard(f"{where} is missing") from None
    if sha256_hex(data) != commit.index_sha256:
        raise DamagedShard(f"{where} is damaged: its sha256 is not the one recorded")
    try:
        with reading_parquet():
            table = pq.read_table(io.BytesIO(data))
            table.validate(full=True)
    except DamagedParquet as error:
        raise DamagedShard(f"{where} is no Parquet file ({error})") from None
    if not table.schema.equals(index_schema(dataset.run.spec)):
        raise DamagedShard(f"{where} has other columns than this version of the format")
    offsets, lengths = (table[name].to_numpy() for name in ("offset", "length"))
    if any((lengths < 0) | (offsets < -1) | (offsets > commit.num_bytes - lengths)):
        raise DamagedShard(f"{where} names bytes beyond the end of the tar")
    return table


def read_indices(dataset: Dataset, commits: Iterable[Commit]) -> Iterator[pa.Table]:
    """The indices of ``commits`` in order, a few in memory at a time. Raises DamagedShard, as :func:`read_index`."""
    return parallel_map(lambda commit: read_index(dataset, commit), commits, _PARALLEL_READS)


def shards_table(dataset: Dataset, commits: Iterable[Commit]) -> pa.Table:
    """The rows of ``manifest/shards.parquet`` that stand for ``commits``."""
    return pa.Table.from_pylist([_shard_row(dataset, commit) for commit in commits], SHARDS_SCHEMA)


def _parts(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables into parts of at least ROWS_PER_PART rows, the last one excepted."""
    held: list[pa.Table] = []
    num_rows = 0
    for table in tables:
        held.append(table)
        num_rows += len(table)
        if num_rows >= ROWS_PER_PART:
            yield pa.concat_tables(held)
            held, num_rows = [], 0
    if held:
        yield pa.concat_tables(held)


def _shard_row(dataset: Dataset, commit: Commit) -> dict[str, Any]:
    ids = dataset.run.sample_ids(commit.shard)
    timing = commit.timing.model_dump()
    return {
        **commit.model_dump(exclude={"rejected", "timing"}),
        **timing,
        "num_rejected": len(commit.rejected),
        "first_key": key(ids[0]),
        "last_key": key(ids[-1]),
        "versions": json.dumps(timing["versions"], sort_keys=True),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
