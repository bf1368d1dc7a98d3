"""Does ``SEALED.json`` and ``manifest/`` say what the commit records and the indices say?

Everything is compared, value by value, in a stream: memory holds a few indices and a batch of rows. Tables are copied
to a local file first, so that what cannot be read *there* is damage, and an error of the storage is none.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import SEALED, SHARDS_TABLE, samples_table
from pipeline.shards.manifest import SHARDS_SCHEMA, read_indices, shards_table, summary
from pipeline.shards.parquet_fault import DamagedParquet, reading_parquet
from pipeline.shards.records import Commit, DamagedRecord
from pipeline.shards.writer import index_schema

_ROWS_PER_BATCH = 16_384


class _DamagedTable(Exception):
    """A table that is not what was written: names the file."""


def check_manifest(dataset: Dataset, commits: list[Commit]) -> list[str]:
    """What is wrong with the manifest of a sealed dataset; nothing if the dataset is not sealed.

    Args:
        dataset: every one of its indices has been checked.
        commits: the records of all its shards, in order.
    """
    try:
        sealed = dataset.sealed
    except DamagedRecord as error:
        return [str(error)]
    if sealed is None:
        return []
    num_parts = sealed.get("sample_tables")
    if not isinstance(num_parts, int) or not 0 <= num_parts <= dataset.run.num_shards:
        return [f"{SEALED}: sample_tables is missing, or more than there are shards"]
    problems = [
        f"{SEALED}: {name} is not that of the commit records"
        for name, value in summary(dataset, commits, num_parts).items()
        if sealed.get(name) != value
    ]
    parts = [samples_table(part) for part in range(num_parts)]
    found = {info.path for info in dataset.storage.list("manifest/")}
    problems += [f"{path} is missing" for path in [SHARDS_TABLE, *parts] if path not in found]
    problems += [f"{path} is not part of the manifest" for path in sorted(found - {SHARDS_TABLE, *parts})]
    if problems:
        return problems
    indices = read_indices(dataset, commits)
    with tempfile.TemporaryDirectory() as folder:
        try:
            shards = _Rows(dataset, [SHARDS_TABLE], SHARDS_SCHEMA, Path(folder))
            shards.compare((commit, shards_table(dataset, [commit])) for commit in commits)
            samples = _Rows(dataset, parts, index_schema(dataset.run.spec), Path(folder))
            samples.compare(zip(commits, indices, strict=True))
        except _DamagedTable as error:
            return [str(error)]
    return []


class _Rows:
    """The rows of some Parquet files, one after the other."""

    def __init__(self, dataset: Dataset, paths: list[str], schema: pa.Schema, folder: Path) -> None:
        self._path = paths[0]
        self._held = schema.empty_table()
        self._batches = self._read(dataset, paths, schema, folder)

    def compare(self, expected: Iterable[tuple[Commit, pa.Table]]) -> None:
        """Raise _DamagedTable unless these are the rows of ``expected``, and no more."""
        for commit, table in expected:
            if not self._take(len(table)).equals(table):
                raise _DamagedTable(f"{self._path}: what it says of shard {commit.shard} is not so")
        if len(self._take(1)) > 0:
            raise _DamagedTable(f"{self._path}: has more rows than the dataset")

    def _take(self, num_rows: int) -> pa.Table:
        while len(self._held) < num_rows and (batch := next(self._batches, None)) is not None:
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([batch])])
        taken, self._held = self._held.slice(0, num_rows), self._held.slice(num_rows)
        return taken

    def _read(self, dataset: Dataset, paths: list[str], schema: pa.Schema, folder: Path) -> Iterator[pa.RecordBatch]:
        local = folder / "table.parquet"
        for path in paths:
            self._path = path
            dataset.storage.download(path, local)
            try:
                with reading_parquet(), pq.ParquetFile(local) as file:
                    if not file.schema_arrow.equals(schema):
                        raise _DamagedTable(f"{path}: has other columns than this version of the format")
                    yield from file.iter_batches(_ROWS_PER_BATCH)
            except DamagedParquet as error:
                raise _DamagedTable(f"{path}: cannot be read ({error})") from None
