"""Scores of a dataset's images: a side table for each shard. Adding one rewrites nothing.

    ROOT/scores/{name}/scorer.json                        create-only: what measured, and the columns
    ROOT/scores/{name}/{shard:06d}-{sha12}.parquet        create-only; sha12 is that of the shard's tar

A table has a row for each *stored* sample of its shard, in order of the keys: column ``key`` (nine digits), then
the scorer's columns (float32, or fixed-size lists of it). Its footer's ``potstill.scores`` entry is the JSON of
:class:`TableInfo`, which names the very shard and the scorer. All tables of a name come from one scorer. A shard that
is made again with other bytes has no table until it is scored again.

What identifies a scorer is the digest of its identity: sha256 over the canonical JSON.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue, ValidationError

from configs.errors import UserError, did_you_mean
from configs.schema import Model
from pipeline.scoring.scorer import Scorer
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.manifest import read_commits
from pipeline.shards.parallel import parallel_map
from pipeline.shards.parquet_fault import reading_parquet
from pipeline.shards.records import Commit
from pipeline.shards.split import stored_ids
from pipeline.shards.writer import DamagedShard

TABLE_VERSION = 1
"""Version of the tables; a reader refuses any other."""
SCORES = "scores/"

_INFO_KEY = b"potstill.scores"
_PARALLEL_READS = 16


class ScorerRecord(Model):
    """``scorer.json``: who measured all tables of a name."""

    format_version: int
    """TABLE_VERSION of its writer."""
    name: str
    """Name of the scores."""
    fingerprint: str
    """Fingerprint of the dataset."""
    digest: str
    """Of the identity."""
    identity: dict[str, JsonValue]
    """What decides the values."""
    columns: dict[str, int | None]
    """Column -> width of its vectors, or None for a number."""

    @property
    def schema(self) -> pa.Schema:
        """Of its tables."""
        number = pa.float32()
        types = {name: number if width is None else pa.list_(number, width) for name, width in self.columns.items()}
        return pa.schema([pa.field("key", pa.string(), False), *(pa.field(*column) for column in types.items())])


class TableInfo(Model):
    """What a table says about itself in its footer."""

    format_version: int
    """TABLE_VERSION of its writer."""
    name: str
    """Name of the scores."""
    fingerprint: str
    """Fingerprint of the dataset."""
    shard_sha256: str
    """Of the tar that was measured."""
    digest: str
    """Of the scorer's identity."""
    identity: dict[str, JsonValue]
    """What decides the values."""


def record_path(name: str) -> str:
    """Path of the scorer's record below the root."""
    return f"{SCORES}{name}/scorer.json"


def table_path(name: str, commit: Commit) -> str:
    """Path of the table of a shard below the root."""
    return f"{SCORES}{name}/{commit.shard:06d}-{commit.sha256[:12]}.parquet"


def record_of(dataset: Dataset, name: str, scorer: Scorer) -> ScorerRecord:
    """What ``scorer.json`` says of a scorer."""
    canonical = json.dumps(scorer.identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return ScorerRecord(
        format_version=TABLE_VERSION,
        name=name,
        fingerprint=dataset.run.fingerprint,
        digest=hashlib.sha256(canonical.encode()).hexdigest(),
        identity=scorer.identity,
        columns=dict(scorer.columns),
    )


def claim(dataset: Dataset, record: ScorerRecord) -> None:
    """Make a scorer the one of its name, or find that it is.

    Raises:
        UserError: another scorer has this name.
    """
    if dataset.storage.create(record_path(record.name), record.model_dump_json(indent=1).encode()):
        return
    found = read_record(dataset, record.name)
    if found.digest != record.digest:
        here, there = record.identity, found.identity
        differing = [name for name in {**there, **here} if here.get(name) != there.get(name)]
        listed = "; ".join(f"{name} is {there.get(name)!r} there, {here.get(name)!r} here" for name in differing)
        raise UserError(
            f"{dataset.storage.uri}/{SCORES}{record.name}: holds scores of another scorer ({listed}); "
            "give these another name"
        )


def read_record(dataset: Dataset, name: str) -> ScorerRecord:
    """The record of a name.

    Raises:
        UserError: there is none, or it is of another dataset or another version.
    """
    where = f"{dataset.storage.uri}/{record_path(name)}"
    try:
        data = dataset.storage.read(record_path(name))
    except FileNotFoundError:
        names = score_names(dataset)
        there = f"there are {', '.join(names)}{did_you_mean(name, names)}" if names else "there are none"
        raise UserError(f"{where}: no scores of this name, {there}; make them with score_pairs.py") from None
    try:
        record = ScorerRecord.model_validate_json(data)
    except ValidationError:
        raise UserError(f"{where}: not a record of scores, or of another version; remove its folder") from None
    if (record.format_version, record.fingerprint) != (TABLE_VERSION, dataset.run.fingerprint):
        raise UserError(f"{where}: of another dataset or another version of the format; remove its folder")
    return record


def score_names(dataset: Dataset) -> list[str]:
    """The names of which there are scores, whole or not."""
    return sorted({info.path.split("/")[1] for info in dataset.storage.list(SCORES) if info.path.count("/") == 2})


def create_table(
    dataset: Dataset, record: ScorerRecord, commit: Commit, values: Mapping[str, NDArray[np.float32]]
) -> bool:
    """Write the table of a shard if it has none, and say whether this call did.

    Args:
        dataset: the dataset.
        record: of the scorer.
        commit: of the shard.
        values: column -> (n,) or (n, width) float32, of the stored samples in order of their keys.
    """
    keys = [key(i) for i in stored_ids(dataset.run, commit).tolist()]
    arrays = [pa.array(keys)]
    for name, width in record.columns.items():
        flat = pa.array(np.ascontiguousarray(values[name]).ravel())
        arrays.append(flat if width is None else pa.FixedSizeListArray.from_arrays(flat, width))
    schema = record.schema.with_metadata({_INFO_KEY: _info(record, commit).model_dump_json()})
    table = pa.Table.from_arrays(arrays, schema=schema)
    table.validate()
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return dataset.storage.create(table_path(record.name, commit), sink.getvalue())


def shards_without_table(dataset: Dataset, name: str, commits: Sequence[Commit]) -> list[Commit]:
    """Those of some shards that have no table of this name, by one listing."""
    found = {info.path for info in dataset.storage.list(f"{SCORES}{name}")}
    return [commit for commit in commits if table_path(name, commit) not in found]


def read_scores(dataset: Dataset, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The tables of all committed shards in order, a few in memory at a time.

    Args:
        dataset: the dataset; its tars need not be there any more.
        name: name of the scores.
        columns: which of them beside ``key``; None is all.

    Raises:
        UserError: there are no scores of this name, or some shards have none.
        DamagedShard: a table is not what was written for its shard.
    """
    record, commits = read_record(dataset, name), read_commits(dataset)
    for column in columns or ():
        if column not in record.columns:
            raise UserError(f"{name}: has no column {column}{did_you_mean(column, record.columns)}")
    missing = shards_without_table(dataset, name, commits)
    if missing:
        raise UserError(
            f"{dataset.storage.uri}/{SCORES}{name}: {len(missing)} of {len(commits)} shards have no scores, the first "
            f"is {missing[0].shard}; run score_pairs.py with this name"
        )
    return parallel_map(partial(_read_table, dataset, record, columns), commits, _PARALLEL_READS)


def read_column(dataset: Dataset, name: str, column: str) -> NDArray[np.float32]:
    """One column of all stored samples in order of their keys, (n,) or (n, width). Raises as :func:`read_scores`."""
    parts = [column_values(table, column) for table in read_scores(dataset, name, [column])]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def column_values(table: pa.Table, column: str) -> NDArray[np.float32]:
    """A column of a table as an array, (n,) or (n, width)."""
    array = table[column].combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy().reshape(-1, array.type.list_size)
    return array.to_numpy()


def _read_table(dataset: Dataset, record: ScorerRecord, columns: Sequence[str] | None, commit: Commit) -> pa.Table:
    path = table_path(record.name, commit)
    mend = "remove it and run score_pairs.py again"
    data = io.BytesIO(dataset.storage.read(path))
    try:
        with reading_parquet(), pq.ParquetFile(data) as file:
            schema = file.schema_arrow
            table = file.read(None if columns is None else ["key", *columns], use_threads=False)
        info = TableInfo.model_validate_json((schema.metadata or {})[_INFO_KEY])
        ids = table["key"].cast(pa.int64()).to_numpy()
    except (ValueError, KeyError) as error:
        raise DamagedShard(
            f"shard {commit.shard}: {path} is no table of scores ({type(error).__name__}); {mend}"
        ) from None
    is_ours = info == _info(record, commit) and schema.equals(record.schema)
    if not is_ours or not np.array_equal(ids, stored_ids(dataset.run, commit)):
        raise DamagedShard(f"shard {commit.shard}: {path} is of another shard or another scorer; {mend}")
    return table


def _info(record: ScorerRecord, commit: Commit) -> TableInfo:
    return TableInfo(shard_sha256=commit.sha256, **record.model_dump(exclude={"columns"}))
