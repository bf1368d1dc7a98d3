"""The manifest: all commits and all index rows of a finished dataset in a few large Parquet files.

Written once, when every shard is in; derived from the commit records and nothing else, so it can be deleted and
written again. Memory is bounded by one part of the sample table, whatever the number of shards.

``SEALED.json`` comes last. Its ``content_sha256`` is the sha256 over the shards' sha256 in order: it names the very
bytes, where the fingerprint names the intention.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import SEALED, SHARDS_TABLE, samples_table, sha256_hex
from pipeline.shards.records import Commit
from pipeline.shards.writer import INDEX_SCHEMA, DamagedShard

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
    commits = read_commits(dataset)
    missing = dataset.run.num_shards - len(commits)
    if missing:
        raise DamagedShard(f"{storage.uri}: {missing} of {dataset.run.num_shards} shards have no commit record")
    storage.write(
        SHARDS_TABLE, _parquet(pa.Table.from_pylist([_shard_row(dataset, c) for c in commits], SHARDS_SCHEMA))
    )
    num_parts = 0
    for num_parts, part in enumerate(_parts(read_indices(dataset, commits)), start=1):
        storage.write(samples_table(num_parts - 1), _parquet(part))
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


def read_commits(dataset: Dataset) -> list[Commit]:
    """All commit records in order of their shards; many at a time, as an object store answers each in tens of ms."""
    shards = sorted(dataset.committed())
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        return [commit for commit in pool.map(dataset.commit, shards) if commit is not None]


def read_index(dataset: Dataset, commit: Commit) -> pa.Table:
    """The index of one shard, checked against its commit record.

    Raises:
        DamagedShard: it is missing, or its sha256 or schema differ.
    """
    where = f"shard {commit.shard}: {commit.index_path}"
    try:
        data = dataset.storage.read(commit.index_path)
    except FileNotFoundError:
        raise DamagedShard(f"{where} is missing") from None
    if sha256_hex(data) != commit.index_sha256:
        raise DamagedShard(f"{where} is damaged: its sha256 is not the one recorded")
    table = pq.read_table(io.BytesIO(data))
    if not table.schema.equals(INDEX_SCHEMA):
        raise DamagedShard(f"{where} has other columns than this version of the format")
    return table


def read_indices(dataset: Dataset, commits: Iterable[Commit]) -> Iterator[pa.Table]:
    """The indices of ``commits`` in order, a few at a time."""
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        remaining = iter(commits)
        while some := list(islice(remaining, _PARALLEL_READS)):
            yield from pool.map(lambda commit: read_index(dataset, commit), some)


def _parts(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Concatenate tables into parts of at least ROWS_PER_PART rows, the last one excepted."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= ROWS_PER_PART:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _shard_row(dataset: Dataset, commit: Commit) -> dict[str, Any]:
    ids = dataset.run.sample_ids(commit.shard)
    timing = commit.timing.model_dump()
    return {
        **commit.model_dump(exclude={"rejected", "timing"}),
        **timing,
        "num_rejected": len(commit.rejected),
        "first_key": f"{ids[0]:09d}",
        "last_key": f"{ids[-1]:09d}",
        "versions": json.dumps(timing["versions"], sort_keys=True),
    }


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
