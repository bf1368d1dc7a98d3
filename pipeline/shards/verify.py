"""Is every committed shard what was written, and is what was written what the spec asks for?

For each commit record, in one sequential pass over the tar:

    record   parses, belongs to this dataset
    index    sha256; one row per sample id of the shard, in order; rejected rows are those of the record
    tar      sha256 and size; members of every stored sample, complete, where the index says
    noise    derived again from seed and sample id: digest of every sample, bytes where it is stored
    prompt   the one of the prompt table
    arrays   shape, dtype, finite;  image: decodes to the right shape

Also: the prompt table's digest, the manifest of a sealed dataset, and files that nothing refers to (harmless).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

import numpy as np

from configs.errors import UserError
from configs.schema import PairsSpec
from pipeline.noise import noise, noise_digest
from pipeline.prompts import PromptTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS, SHARDS_TABLE, key
from pipeline.shards.manifest import read_commits, read_index
from pipeline.shards.members import decode_array, decode_image
from pipeline.shards.records import Commit, DamagedRecord
from pipeline.shards.writer import DamagedShard

MIN_AGE_OF_GARBAGE = timedelta(hours=24)
"""A younger unreferenced file may belong to a writer that is about to commit."""
_PARALLEL_SHARDS = 4


@dataclass
class Findings:
    """What a verification found.

    Attributes:
        num_shards: shards whose commit record was checked.
        num_samples: stored samples that were checked.
        missing: shards without a commit record.
        damaged: what is wrong, by shard.
        dataset: what is wrong with the dataset as a whole.
        unreferenced: paths of files that no commit record names.
    """

    num_shards: int = 0
    num_samples: int = 0
    missing: list[int] = field(default_factory=list[int])
    damaged: dict[int, str] = field(default_factory=dict[int, str])
    dataset: list[str] = field(default_factory=list[str])
    unreferenced: list[str] = field(default_factory=list[str])


def verify(dataset: Dataset) -> Findings:
    """Check a whole dataset; reads every byte of it once, holds one sample of a few shards at a time."""
    findings = Findings()
    findings.dataset += _check_prompts(dataset)
    committed = dataset.committed()
    findings.missing = sorted(set(range(dataset.run.num_shards)) - committed)
    commits: list[Commit] = []
    with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
        for shard, commit, problem in pool.map(lambda shard: _check_shard(dataset, shard), sorted(committed)):
            findings.num_shards += 1
            if problem is not None:
                findings.damaged[shard] = problem
            elif commit is not None:
                findings.num_samples += commit.num_samples
                commits.append(commit)
    findings.dataset += _check_manifest(dataset, findings)
    if not findings.damaged:
        findings.unreferenced = sorted(info[0] for info in unreferenced(dataset, commits))
    return findings


def unreferenced(dataset: Dataset, commits: list[Commit]) -> Iterator[tuple[str, datetime]]:
    """Path and time of the files below ``shards/`` and ``index/`` that no commit record names."""
    named = {commit.path for commit in commits} | {commit.index_path for commit in commits}
    for prefix in ("shards/", "index/"):
        for info in dataset.storage.list(prefix):
            if info.path not in named:
                yield info.path, info.modified


def collect_garbage(dataset: Dataset) -> list[str]:
    """Delete unreferenced files older than a day; returns their paths."""
    horizon = datetime.now(UTC) - MIN_AGE_OF_GARBAGE
    old = sorted(path for path, modified in unreferenced(dataset, read_commits(dataset)) if modified < horizon)
    for path in old:
        dataset.storage.delete(path)
    return old


def _check_shard(dataset: Dataset, shard: int) -> tuple[int, Commit | None, str | None]:
    commit = None
    try:
        if shard >= dataset.run.num_shards:
            raise DamagedShard(f"shard {shard}: the dataset has only {dataset.run.num_shards}")
        commit = dataset.commit(shard)
        if commit is not None:
            check_commit(dataset, commit)
    except (DamagedShard, DamagedRecord) as error:
        return shard, commit, str(error)
    return shard, commit, None


def check_commit(dataset: Dataset, commit: Commit) -> None:
    """Check one committed shard.

    Raises:
        DamagedShard: it is not what was written, or not what the spec asks for; names the shard and the first fault.
    """
    spec, shard = dataset.run.spec, commit.shard
    rows: list[dict[str, Any]] = read_index(dataset, commit).to_pylist()
    _expect(shard, "index keys", [row["key"] for row in rows], [key(i) for i in dataset.run.sample_ids(shard)])
    rejected = [(row["key"], row["reason"]) for row in rows if row["status"] == "rejected"]
    _expect(shard, "rejected samples", rejected, [(entry.key, entry.reason) for entry in commit.rejected])
    stored = [row for row in rows if row["status"] == "ok"]
    _expect(shard, "number of samples", len(stored), commit.num_samples)
    _check_origin(dataset, shard, rows)
    try:
        source = dataset.storage.reader(commit.path)
    except FileNotFoundError:
        raise DamagedShard(f"shard {shard}: {commit.path} is missing") from None
    with source:
        hashing = _HashingReader(source)
        fault = _first_fault(spec, shard, hashing, stored)
        while hashing.read(1 << 20):
            pass
    if hashing.sha256.hexdigest() != commit.sha256:
        size = f"{hashing.num_bytes:,} bytes of {commit.num_bytes:,}; " if hashing.num_bytes != commit.num_bytes else ""
        raise DamagedShard(f"shard {shard}: {commit.path} is damaged: {size}its sha256 is not the one recorded")
    if fault is not None:
        raise fault


def _check_origin(dataset: Dataset, shard: int, rows: list[dict[str, Any]]) -> None:
    """Noise and prompts follow from the spec alone: derive them again."""
    spec = dataset.run.spec
    ids = dataset.run.sample_ids(shard)
    first, last = ids[0] // spec.pairs_per_prompt, ids[-1] // spec.pairs_per_prompt
    prompt_ids, prompts = PromptTable.open(dataset.storage, PROMPTS).rows(first, last + 1)
    for i, row in zip(ids, rows, strict=True):
        at = i // spec.pairs_per_prompt - first
        _expect(shard, f"prompt of {row['key']}", (row["prompt_id"], row["prompt"]), (prompt_ids[at], prompts[at]))
        digest = noise_digest(noise(spec.seed, i, spec.teacher.sample_shape))
        _expect(shard, f"noise digest of {row['key']}", row["noise_digest"], digest)


def _first_fault(
    spec: PairsSpec, shard: int, source: "_HashingReader", stored: list[dict[str, Any]]
) -> DamagedShard | None:
    """Walk the tar against the index. A fault is returned, not raised: the sha256, once known, may explain it."""
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            infos = iter(tar)
            for row in stored:
                members: dict[str, bytes] = {}
                start = None
                for suffix in expected_suffixes(spec):
                    info = next(infos, None)
                    name = f"{row['key']}.{suffix}"
                    if info is None or info.name != name or not info.isreg():
                        raise DamagedShard(f"shard {shard}: member {name} is missing")
                    start = info.offset if start is None else start
                    file = tar.extractfile(info)
                    members[suffix] = file.read() if file else b""
                _expect(shard, f"offset of {row['key']}", start, row["offset"])
                _check_members(spec, shard, row, members)
            if (extra := next(infos, None)) is not None:
                raise DamagedShard(f"shard {shard}: member {extra.name} is not in the index")
    except DamagedShard as fault:
        return fault
    except (tarfile.TarError, ValueError, OSError, EOFError) as error:
        return DamagedShard(f"shard {shard}: cannot be read ({error})")
    return None


def expected_suffixes(spec: PairsSpec) -> list[str]:
    """The members of every sample, in the order in which they lie in a shard."""
    fields = spec.fields
    present = {
        "json": True,
        "noise.npy": fields.noise,
        "x0.npy": fields.x0 != "none",
        "text_embedding.npy": fields.text_embedding,
        "txt": fields.prompt,
        fields.image: fields.image != "none",
    }
    return sorted(suffix for suffix, is_stored in present.items() if is_stored)


def _check_members(spec: PairsSpec, shard: int, row: dict[str, Any], members: dict[str, bytes]) -> None:
    where = f"of {row['key']}"
    about = json.loads(members["json"])
    for name in ("key", "prompt_id", "seed", "noise_digest"):
        _expect(shard, f"{name} {where}", about.get(name), row[name])
    if "noise.npy" in members:
        stored = decode_array(members["noise.npy"])
        _expect(shard, f"noise {where}", (stored.shape, stored.dtype), (spec.teacher.sample_shape, np.dtype("float16")))
        _expect(shard, f"noise {where}", noise_digest(stored.astype(np.float16)), row["noise_digest"])
    if "x0.npy" in members:
        x0 = decode_array(members["x0.npy"])
        shape = spec.teacher.image_shape if spec.fields.x0 == "pixels" else spec.teacher.sample_shape
        _expect(shard, f"x0 {where}", (x0.shape, x0.dtype), (shape, np.dtype(spec.fields.x0_dtype)))
        _expect(shard, f"x0 {where} finite", bool(np.isfinite(x0).all()), True)
    if "txt" in members:
        _expect(shard, f"prompt {where}", members["txt"].decode(), row["prompt"])
    if spec.fields.image != "none":
        channels, height, width = spec.teacher.image_shape
        image = decode_image(members[spec.fields.image])
        _expect(shard, f"image {where}", image.shape, (height, width, channels))


def _check_prompts(dataset: Dataset) -> list[str]:
    try:
        prompts = PromptTable.open(dataset.storage, PROMPTS)
        prompts.verify()
    except (UserError, FileNotFoundError) as error:
        return [str(error)]
    if prompts.digest != dataset.run.spec.prompts_digest:
        return [f"{PROMPTS}: is not the prompt table of this dataset"]
    return []


def _check_manifest(dataset: Dataset, findings: Findings) -> list[str]:
    sealed = dataset.sealed
    if sealed is None:
        return []
    problems: list[str] = []
    if findings.missing:
        problems.append(f"SEALED.json: {len(findings.missing)} shards of a sealed dataset have no commit record")
    elif not findings.damaged:
        commits = read_commits(dataset)
        content = hashlib.sha256("\n".join(commit.sha256 for commit in commits).encode()).hexdigest()
        if content != sealed.get("content_sha256"):
            problems.append("SEALED.json: content_sha256 is not that of the shards")
    if not dataset.storage.exists(SHARDS_TABLE):
        problems.append(f"{SHARDS_TABLE} is missing")
    return problems


def _expect(shard: int, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DamagedShard(f"shard {shard}: {what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
