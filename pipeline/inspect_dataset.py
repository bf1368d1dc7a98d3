"""What ``status.py`` and ``verify_shards.py`` print about a dataset, and what the latter mends."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

from configs.encode_schema import ImagesSpec
from configs.errors import RunStopped, UserError
from configs.schema import PairsSpec, StatusConfig, VerifyShardsConfig
from pipeline.lease import Lease, read_lease
from pipeline.noise import check_noise_recipe
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS, SEALED, SOURCES
from pipeline.shards.manifest import read_commits
from pipeline.shards.storage import Storage
from pipeline.shards.verify import Findings, collect_garbage, verify

if TYPE_CHECKING:
    from pipeline.deep_verify import Comparison

_LEASE_PERIOD_S = 10.0


def status(config: StatusConfig) -> None:
    """Print how far a dataset is, from its commit records.

    Raises:
        UserError: there is no dataset at the root, or its lease is damaged.
        RunStopped: a record is damaged.
    """
    dataset = Dataset.open_any(Storage.open(config.root))
    run, spec = dataset.run, dataset.run.spec
    commits = read_commits(dataset)
    stored = sum(commit.num_samples for commit in commits)
    rejected = sum(len(commit.rejected) for commit in commits)
    seconds = sum(commit.timing.sample_seconds for commit in commits)
    parked = sorted(dataset.parked())
    megabytes = sum(commit.num_bytes for commit in commits) / 1e6
    print(f"dataset      {dataset.storage.uri}  ({run.fingerprint[:16]}, created {run.created})")
    print(f"{'teacher' if run.holds == 'pairs' else 'source':<12} {_origin(spec)}")
    print(f"shards       {len(commits):,} of {run.num_shards:,} ({len(commits) / run.num_shards:.1%})")
    print(f"{run.holds:<12} {stored:,} of {spec.num_samples:,}, {rejected:,} rejected, {megabytes:,.1f} MB")
    if seconds:
        print(f"speed        {stored / seconds:,.2f} images/s per device, {seconds / 3600:,.2f} device-hours")
    if parked:
        first = ", ".join(map(str, parked[:10])) + (" ..." if len(parked) > 10 else "")
        print(f"parked       {len(parked):,}: {first} (reasons in parked/)")
    print(f"state        {_state(dataset, run.num_shards - len(commits))}")


def _origin(spec: PairsSpec | ImagesSpec) -> str:
    if isinstance(spec, ImagesSpec):
        latents = f", latents {'x'.join(map(str, spec.latents.sample_shape))}" if spec.latents else ""
        return f"{spec.sources_digest[:16]}, {spec.image_size} pixels by {spec.resize}{latents}"
    sampler = f"{spec.sampler.name}, guidance_scale {spec.guidance_scale:g}"
    return f"{spec.teacher.kind} {spec.teacher.weights_digest[:16]}, {sampler}"


def _state(dataset: Dataset, num_missing: int) -> str:
    if dataset.sealed is not None:
        if num_missing:
            return f"sealed, yet {num_missing:,} commit records are lost; run verify_shards.py --repair"
        return "sealed: complete, manifest and data card written"
    todo = f"{num_missing:,} shards to make, run {dataset.run.made_by} with the same config"
    lease = read_lease(dataset.storage)
    if lease is None:
        return f"no run holds it; {todo}"
    if lease.ended_here:
        return f"no run holds it ({lease.owner} was killed); {todo}"
    return (
        f"{lease.owner} holds it, heartbeat {lease.beat}; should that number stand still for {3 * lease.period_s:g} s, "
        "it has died and the next run takes over"
    )


def verify_shards(config: VerifyShardsConfig) -> None:
    """Verify a dataset and print what was found; repair and collect garbage if asked.

    Whoever repairs or deletes holds the dataset's lease, so that no run works on it meanwhile.

    Raises:
        UserError: there is no dataset at the root, a run works on it, or the flags do not go together.
        RunStopped: something is damaged, and was not withdrawn.
    """
    check_noise_recipe()
    dataset = Dataset.open_any(Storage.open(config.root))
    if config.redo_rejected and not config.repair:
        raise UserError("--redo_rejected: withdraws shards, which only --repair may do; add --repair")
    if config.gc and not dataset.storage.exists(SEALED):
        raise UserError("--gc: the dataset is not sealed, a run may still need these files; finish it first")
    if config.deep and dataset.run.holds != "pairs":
        raise UserError("--deep: runs a teacher again, and real images have none; leave it out")
    with Lease(dataset.storage, _LEASE_PERIOD_S) if config.repair or config.gc else nullcontext() as lease:
        findings = verify(dataset)
        for problem in findings.problems:
            print(f"DAMAGED  {problem}")
        print(_summary(dataset, findings))
        differing = _deep(config, dataset, findings) if config.deep else {}
        left = len(findings.problems) + len(differing)
        if lease is not None:
            lease.check()
        if config.repair:
            _repair(config, dataset, findings, differing)
            left = len(findings.table)
        if left:
            raise RunStopped(f"{config.root}: {left} problems{_hint(config, dataset, findings, left)}")
        if config.gc and not dataset.storage.exists(SEALED):
            raise RunStopped(
                f"{config.root}: --gc deleted nothing, shards were withdrawn; run {dataset.run.made_by} first"
            )
        if config.gc:
            print(f"deleted {len(collect_garbage(dataset, findings.whole))} unreferenced files")
        elif findings.unreferenced:
            print(f"{len(findings.unreferenced)} files are named by no commit record (harmless; --gc deletes old ones)")


def _summary(dataset: Dataset, findings: Findings) -> str:
    run = dataset.run
    text = f"{len(findings.whole):,} of {run.num_shards:,} shards whole, {findings.num_samples:,} {run.holds}"
    return text + (f"; {len(findings.missing):,} not made yet" if findings.missing else "")


def _hint(config: VerifyShardsConfig, dataset: Dataset, findings: Findings, num_problems: int) -> str:
    hint, made_by = "", dataset.run.made_by
    if findings.table and dataset.run.holds == "pairs":
        hint += f"; {PROMPTS} is beyond repair: put the right one back, or make it again with prepare_prompts.py"
    elif findings.table:
        hint += f"; {SOURCES} is beyond repair: remove {SEALED} and run {made_by} again, which writes it"
    if num_problems > len(findings.table):
        hint += f"; --repair withdraws what {made_by} can make again"
    return hint + ("; --gc deleted nothing" if config.gc else "")


def _deep(config: VerifyShardsConfig, dataset: Dataset, findings: Findings) -> dict[str, "Comparison"]:
    """Compare with the teacher; returns the samples that differ, by key."""
    from pipeline.deep_verify import deep_verify

    teacher = dataset.run.teacher
    if config.teacher_path is not None:
        if "path" not in type(teacher).model_fields:
            raise UserError(f"--teacher_path: a {teacher.kind} teacher has no path")
        teacher = teacher.model_copy(update={"path": config.teacher_path})
    comparisons = deep_verify(dataset, findings.whole, config.deep, teacher)
    worst = max(comparisons, key=lambda comparison: comparison.relative_rms)
    print(
        f"teacher run again on {len(comparisons)} samples: relative rms difference at most "
        f"{worst.relative_rms:.2e} (sample {worst.key}), {config.tolerance:g} allowed"
    )
    differing = {found.key: found for found in comparisons if found.relative_rms > config.tolerance}
    for found in differing.values():
        print(f"DAMAGED  shard {found.shard}: sample {found.key} differs from the teacher by {found.relative_rms:.2e}")
    return differing


def _repair(
    config: VerifyShardsConfig, dataset: Dataset, findings: Findings, differing: dict[str, "Comparison"]
) -> None:
    """Withdraw every shard there is something wrong with, and the seal if anything at all is."""
    damaged = dict(findings.damaged)
    for found in differing.values():
        damaged.setdefault(found.shard, f"sample {found.key} differs from the teacher by {found.relative_rms:.2e}")
    rejected: dict[int, str] = {}
    if config.redo_rejected:
        for commit in findings.whole:
            if commit.rejected and commit.shard not in damaged:
                rejected[commit.shard] = f"{len(commit.rejected)} of its samples are rejected"
    if damaged or rejected or findings.problems:
        dataset.unseal()
        for shard, reason in {**damaged, **rejected}.items():
            dataset.withdraw(shard, reason)
        print(
            f"withdrew {len(damaged)} damaged shards and {len(rejected)} with rejected samples; "
            f"run {dataset.run.made_by} again to make what is missing"
        )
