"""What ``status.py`` and ``verify_shards.py`` print about a dataset."""

import json

from configs.errors import RunStopped, UserError
from configs.schema import StatusConfig, VerifyShardsConfig
from pipeline.deep_verify import deep_verify
from pipeline.noise import check_noise_recipe
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import LEASE
from pipeline.shards.manifest import read_commits
from pipeline.shards.records import DamagedRecord
from pipeline.shards.storage import Storage
from pipeline.shards.verify import Findings, collect_garbage, verify


def status(config: StatusConfig) -> None:
    """Print how far a dataset is, from its commit records.

    Raises:
        UserError: there is no dataset at the root.
        RunStopped: a record is damaged.
    """
    dataset = _open(config.root)
    run, spec = dataset.run, dataset.run.spec
    commits = read_commits(dataset)
    stored = sum(commit.num_samples for commit in commits)
    rejected = sum(len(commit.rejected) for commit in commits)
    seconds = sum(commit.timing.sample_seconds for commit in commits)
    parked = sorted(dataset.parked())
    megabytes = sum(commit.num_bytes for commit in commits) / 1e6
    sampler = f"{spec.sampler.name}, guidance_scale {spec.guidance_scale:g}"
    print(f"dataset      {dataset.storage.uri}  ({run.fingerprint[:16]}, created {run.created})")
    print(f"teacher      {spec.teacher.kind} {spec.teacher.weights_digest[:16]}, {sampler}")
    print(f"shards       {len(commits):,} of {run.num_shards:,} ({len(commits) / run.num_shards:.1%})")
    print(f"pairs        {stored:,} of {spec.num_samples:,}, {rejected:,} rejected, {megabytes:,.1f} MB")
    if seconds:
        print(f"speed        {stored / seconds:,.2f} images/s per device, {seconds / 3600:,.2f} device-hours")
    if parked:
        first = ", ".join(map(str, parked[:10])) + (" ..." if len(parked) > 10 else "")
        print(f"parked       {len(parked):,}: {first} (reasons in parked/)")
    print(f"state        {_state(dataset, len(commits))}")


def _state(dataset: Dataset, num_committed: int) -> str:
    if dataset.sealed is not None:
        return "sealed: complete, manifest and data card written"
    try:
        lease = json.loads(dataset.storage.read(LEASE))
    except FileNotFoundError:
        todo = dataset.run.num_shards - num_committed
        return f"no run holds it; {todo:,} shards to make, run generate_pairs.py with the same config"
    return f"process {lease['pid']} on {lease['host']} holds the lease (heartbeat {lease['beat']})"


def verify_shards(config: VerifyShardsConfig) -> None:
    """Verify a dataset and print what was found; repair and collect garbage if asked.

    Raises:
        UserError: there is no dataset at the root, or garbage collection is asked of an unfinished one.
        RunStopped: something is damaged.
    """
    check_noise_recipe()
    dataset = _open(config.root)
    if config.gc and dataset.sealed is None:
        raise UserError("--gc: the dataset is not sealed, a run may still need these files; finish it first")
    findings = verify(dataset)
    problems = findings.dataset + [text for _, text in sorted(findings.damaged.items())]
    for problem in problems:
        print(f"DAMAGED  {problem}")
    print(_summary(dataset, findings))
    if config.deep and not problems:
        problems += _deep(config, dataset)
    if config.gc:
        print(f"deleted {len(collect_garbage(dataset))} unreferenced files")
    elif findings.unreferenced:
        print(f"{len(findings.unreferenced)} files are named by no commit record (harmless; --gc deletes old ones)")
    if config.repair and findings.damaged:
        for shard, reason in findings.damaged.items():
            dataset.withdraw(shard, reason)
        print(f"withdrew {len(findings.damaged)} damaged shards; run generate_pairs.py again to make just these")
    elif problems:
        hint = "; --repair withdraws the damaged shards" if findings.damaged else ""
        raise RunStopped(f"{config.root}: {len(problems)} problems{hint}")


def _summary(dataset: Dataset, findings: Findings) -> str:
    whole = findings.num_shards - len(findings.damaged)
    text = f"{whole:,} of {dataset.run.num_shards:,} shards whole, {findings.num_samples:,} pairs"
    return text + (f"; {len(findings.missing):,} not made yet" if findings.missing else "")


def _deep(config: VerifyShardsConfig, dataset: Dataset) -> list[str]:
    teacher = dataset.run.teacher
    if config.teacher_path is not None:
        if "path" not in type(teacher).model_fields:
            raise UserError(f"--teacher_path: a {teacher.kind} teacher has no path")
        teacher = teacher.model_copy(update={"path": config.teacher_path})
    comparisons = deep_verify(dataset, config.deep, teacher)
    worst = max(comparisons, key=lambda comparison: comparison.relative_rms)
    print(
        f"teacher run again on {len(comparisons)} samples: relative rms difference at most "
        f"{worst.relative_rms:.2e} (sample {worst.key}), {config.tolerance:g} allowed"
    )
    bad = [comparison for comparison in comparisons if not comparison.relative_rms <= config.tolerance]
    for comparison in bad:
        print(f"DAMAGED  sample {comparison.key}: differs from the teacher by {comparison.relative_rms:.2e}")
    return [comparison.key for comparison in bad]


def _open(root: str) -> Dataset:
    try:
        return Dataset.open(Storage.open(root))
    except DamagedRecord as error:
        raise RunStopped(str(error)) from None
