"""Is a dataset what was written, and is what was written what its spec asks for?

Every shard (see :mod:`pipeline.shards.check_shard`), the prompt table or the list of images, the manifest
of a sealed dataset (see :mod:`pipeline.shards.check_manifest`), and files that nothing refers to, which are harmless.

Only bytes that were read and are wrong count as damage. When the storage fails there is no finding: the OSError is the
caller's.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from configs.encode_schema import ImagesSpec
from pipeline.images.source_table import SourceTable
from pipeline.prompts import PromptTable
from pipeline.shards.check_images import ImageContents
from pipeline.shards.check_manifest import check_manifest
from pipeline.shards.check_pairs import PairContents
from pipeline.shards.check_shard import Contents, check_shard
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS, SEALED, SOURCES
from pipeline.shards.local_table import LocalTable
from pipeline.shards.parallel import parallel_map
from pipeline.shards.records import Commit, DamagedRecord
from pipeline.shards.writer import DamagedShard

MIN_AGE_OF_GARBAGE = timedelta(hours=24)
"""A younger unreferenced file may belong to a writer that is about to commit."""
_PARALLEL_SHARDS = 4


@dataclass
class Findings:
    """What a verification found.

    Attributes:
        whole: records of the shards with which all is well, in order.
        missing: shards without a commit record.
        damaged: what is wrong, by shard.
        table: what is wrong with the prompt table, or with the list of images. If anything is, what the shards say of
            prompts or images was not checked.
        manifest: what is wrong with ``SEALED.json`` and ``manifest/``, which can be derived again.
        unreferenced: paths of files that no commit record names, if every record could be read.
    """

    whole: list[Commit] = field(default_factory=list[Commit])
    missing: list[int] = field(default_factory=list[int])
    damaged: dict[int, str] = field(default_factory=dict[int, str])
    table: list[str] = field(default_factory=list[str])
    manifest: list[str] = field(default_factory=list[str])
    unreferenced: list[str] = field(default_factory=list[str])

    @property
    def num_samples(self) -> int:
        """Stored samples of the whole shards."""
        return sum(commit.num_samples for commit in self.whole)

    @property
    def problems(self) -> list[str]:
        """One line for everything that is wrong. A dataset in the making has none for being incomplete."""
        return [*self.table, *self.damaged.values(), *self.manifest]


def verify(dataset: Dataset) -> Findings:
    """Check a whole dataset.

    Reads every byte of it once, and the indices of a sealed one twice. Memory: all commit records, about 1 kB each,
    and of a few shards at a time the index and one sample.

    Raises:
        OSError: the storage failed.
    """
    findings = Findings()
    committed = dataset.committed()
    findings.missing = sorted(set(range(dataset.run.num_shards)) - committed)
    with tempfile.TemporaryDirectory() as folder:
        contents = _contents(dataset, Path(folder), findings)

        def check(shard: int) -> tuple[int, Commit | str]:
            return shard, _check(dataset, shard, contents)

        for shard, result in parallel_map(check, sorted(committed), _PARALLEL_SHARDS):
            if isinstance(result, str):
                findings.damaged[shard] = result
            else:
                findings.whole.append(result)
    if findings.missing and dataset.storage.exists(SEALED):
        findings.manifest.append(f"{SEALED}: {len(findings.missing)} shards of a sealed dataset have no commit record")
    elif not findings.damaged:
        findings.manifest += check_manifest(dataset, findings.whole)
    if not findings.damaged:
        findings.unreferenced = sorted(path for path, _ in unreferenced(dataset, findings.whole))
    return findings


def unreferenced(dataset: Dataset, commits: Iterable[Commit]) -> Iterator[tuple[str, datetime]]:
    """Path and time of the shards and indices that no commit record names, and of unfinished local writes."""
    named = {path for commit in commits for path in (commit.path, commit.index_path)}
    for prefix in ("shards/", "index/"):
        for info in dataset.storage.list(prefix):
            if info.path not in named:
                yield info.path, info.modified
    for info in dataset.storage.leftovers():
        yield info.path, info.modified


def collect_garbage(dataset: Dataset, commits: Iterable[Commit]) -> list[str]:
    """Delete unreferenced files older than a day; returns their paths.

    Args:
        dataset: every one of its shards exists: what an incomplete dataset does not name may be all that is left of it.
        commits: the records of all its shards.
    """
    horizon = datetime.now(UTC) - MIN_AGE_OF_GARBAGE
    old = sorted(path for path, modified in unreferenced(dataset, commits) if modified < horizon)
    for path in old:
        dataset.storage.delete(path)
    return old


def _contents(dataset: Dataset, folder: Path, findings: Findings) -> Contents:
    """What the shards should hold, by a copy of the table that the samples refer to, if that is the right one."""
    spec = dataset.run.spec
    try:
        if isinstance(spec, ImagesSpec):
            sources = ImageContents.table(dataset, spec, folder)
            return ImageContents(dataset, spec, sources if _is_right(sources, findings) else None)
        prompts = PairContents.table(dataset, folder)
        return PairContents(dataset, prompts if _is_right(prompts, findings) else None)
    except FileNotFoundError:
        findings.table.append(f"{SOURCES if isinstance(spec, ImagesSpec) else PROMPTS} is missing")
    return ImageContents(dataset, spec, None) if isinstance(spec, ImagesSpec) else PairContents(dataset, None)


def _is_right(table: LocalTable[PromptTable] | LocalTable[SourceTable], findings: Findings) -> bool:
    if (problem := table.problem()) is not None:
        findings.table.append(problem)
    return problem is None


def _check(dataset: Dataset, shard: int, contents: Contents) -> Commit | str:
    """The shard's record if all is well, else what is wrong."""
    try:
        if shard >= dataset.run.num_shards:
            return f"shard {shard}: the dataset has only {dataset.run.num_shards}"
        commit = dataset.commit(shard)
        if commit is None:
            return f"shard {shard}: its commit record has gone while it was checked"
        check_shard(dataset, commit, contents)
    except (DamagedShard, DamagedRecord) as error:
        return str(error)
    return commit
