"""Is a committed shard what was written, and is what was written what the spec asks for?

    record   parses, belongs to this dataset
    index    sha256; one row per sample id of the shard, in order; what follows from the spec is so
    tar      sha256; the members of every stored sample, complete, and they lie where the index says
    members  what follows from the spec is so

What follows is known to :mod:`pipeline.shards.check_pairs` and :mod:`pipeline.shards.check_images`. One sequential pass
over the tar; memory holds one sample.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, Protocol

from pipeline.shards.dataset import Dataset
from pipeline.shards.expectation import expect
from pipeline.shards.layout import key
from pipeline.shards.manifest import read_index
from pipeline.shards.records import Commit
from pipeline.shards.writer import DamagedShard


class Contents(Protocol):
    """What follows from a dataset's spec, and from the table that its samples refer to.

    Attributes:
        suffixes: the members of every stored sample, in the order in which they lie in a shard.
        max_bytes: more than any member of an honest sample has: the bound of what is read at once.
    """

    suffixes: list[str]
    max_bytes: int

    def rows(self, ids: range) -> Iterator[dict[str, object]]:
        """The columns of each sample that do not depend on what became of it."""
        ...

    def check(self, shard: int, row: dict[str, Any], members: dict[str, bytes]) -> None:
        """Check the members of a stored sample. Raises DamagedShard, or ValueError where one cannot be decoded."""
        ...


def check_shard(dataset: Dataset, commit: Commit, contents: Contents) -> None:
    """Check one committed shard.

    Args:
        dataset: the dataset.
        commit: the shard's record.
        contents: what its samples should be.

    Raises:
        DamagedShard: it is not what was written, or not what the spec asks for; names the shard and the first fault.
        OSError: the storage failed, which says nothing about the shard.
    """
    shard = commit.shard
    rows: list[dict[str, Any]] = read_index(dataset, commit).to_pylist()
    _check_index(dataset, commit, rows, contents)
    try:
        source = dataset.storage.reader(commit.path)
    except FileNotFoundError:
        raise DamagedShard(f"shard {shard}: {commit.path} is missing") from None
    with source:
        hashing = _HashingReader(source)
        fault = _first_fault(contents, shard, hashing, [row for row in rows if row["status"] == "ok"])
        while hashing.read(1 << 20):
            pass
    if hashing.sha256.hexdigest() != commit.sha256:
        size = f"{hashing.num_bytes:,} bytes of {commit.num_bytes:,}; " if hashing.num_bytes != commit.num_bytes else ""
        raise DamagedShard(f"shard {shard}: {commit.path} is damaged: {size}its sha256 is not the one recorded")
    if fault is not None:
        raise fault
    expect(shard, "num_bytes of the commit record", commit.num_bytes, hashing.num_bytes)


def _check_index(dataset: Dataset, commit: Commit, rows: list[dict[str, Any]], contents: Contents) -> None:
    """Compare the index with what follows from the spec and the commit record."""
    shard, ids = commit.shard, dataset.run.sample_ids(commit.shard)
    expect(shard, "index keys", [row["key"] for row in rows], [key(i) for i in ids])
    rejected = [(row["key"], row["reason"]) for row in rows if row["status"] == "rejected"]
    expect(shard, "rejected samples", rejected, [(entry.key, entry.reason) for entry in commit.rejected])
    stored = [row for row in rows if row["status"] == "ok"]
    expect(shard, "number of samples", len(stored), commit.num_samples)
    num_truncated = sum(row.get("prompt_truncated", False) for row in stored)
    expect(shard, "number of truncated", num_truncated, commit.num_truncated)
    position = 0
    for columns, row in zip(contents.rows(ids), rows, strict=True):
        expected = {"shard": shard, **columns}
        if row["status"] == "ok":
            expected |= {"row": position, "reason": ""}
            position += 1
        else:
            expected |= {"status": "rejected", "row": -1, "offset": -1, "length": 0}
        for name, value in expected.items():
            expect(shard, f"{name} of {row['key']}", row[name], value)


def _first_fault(
    contents: Contents, shard: int, source: "_HashingReader", stored: list[dict[str, Any]]
) -> DamagedShard | None:
    """Walk the tar against the index. A fault is returned, not raised: the sha256, once known, may explain it."""
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for row in stored:
                members: dict[str, bytes] = {}
                start = end = 0
                for suffix in contents.suffixes:
                    info = _next(tar)
                    name = f"{row['key']}.{suffix}"
                    if info is None or info.name != name or not info.isreg() or info.issparse():
                        raise DamagedShard(f"shard {shard}: member {name} is missing")
                    if info.size > contents.max_bytes:  # before room is made for it
                        raise DamagedShard(f"shard {shard}: member {name} has {info.size:,} bytes, which no sample has")
                    start = start if members else info.offset
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    file = tar.extractfile(info)
                    members[suffix] = file.read() if file else b""
                expect(shard, f"offset of {row['key']}", row["offset"], start)
                expect(shard, f"length of {row['key']}", row["length"], end - start)
                contents.check(shard, row, members)
            if (extra := _next(tar)) is not None:
                raise DamagedShard(f"shard {shard}: member {extra.name} is not in the index")
    except DamagedShard as fault:
        return fault
    except (tarfile.TarError, ValueError, EOFError) as error:
        return DamagedShard(f"shard {shard}: cannot be read ({error})")
    return None


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; ``tarfile`` would remember all of them, also of a stream that it cannot rewind."""
    info = tar.next()
    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
    return info


class _HashingReader(io.BufferedIOBase):
    """A sequential reader that hashes what passes through."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__()
        self._source = source
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._source.read(-1 if size is None else size)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return data
