"""From a config to a finished dataset: look before you leap, then drive.

Everything a user can have got wrong is checked before the output is touched: config, output, prompts, teacher,
sampler, resources. Then ``run.json`` fixes the identity, a lease keeps other runs away, the shards that have no commit
are made, and at the end the manifest and the data card are written.
"""

import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from configs.errors import RunStopped, UserError
from configs.fingerprint import fingerprint
from configs.schema import GeneratePairsConfig, PairsSpec
from pipeline import teachers
from pipeline.card import write_card
from pipeline.driver import Executor, StopRequest, drive
from pipeline.lease import Lease
from pipeline.noise import check_noise_recipe
from pipeline.pairs import PairWorker
from pipeline.plan import print_plan
from pipeline.progress import Progress
from pipeline.prompts import PromptTable, is_prompt_table, prepare_prompts
from pipeline.provenance import code_revision
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import MAX_SAMPLES, MAX_SHARDS, PROMPTS
from pipeline.shards.manifest import seal, write_manifest
from pipeline.shards.records import Run
from pipeline.shards.storage import Storage


def generate_pairs(config: GeneratePairsConfig) -> None:
    """Bring the dataset at ``config.output`` to its end, from wherever it is; or, with ``config.plan``, say its cost.

    Raises:
        UserError: the config cannot work, or the output holds something else; nothing has been written.
        RunStopped: the run ended early or shards are parked; everything committed is kept.
    """
    check_noise_recipe()
    storage = Storage.open(config.output)
    teachers.check(config.teacher, config.spec)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / PROMPTS
        run = _resolve(config, _prompt_table(config, table))
        if config.plan:
            print_plan(config, run, table)
            return
        executor = _executor(config, storage.uri)
        try:
            dataset = Dataset.create_or_open(storage, run)
            if dataset.sealed is not None:
                print(f"{storage.uri}: all {run.num_shards} shards exist; nothing to do")
                return
            with Lease(storage, config.runtime.lease_period_s) as lease, StopRequest().installed() as stop:
                if not storage.exists(PROMPTS):
                    storage.upload(PROMPTS, table)
                _make_missing_shards(config, dataset, executor, lease, stop)
                _finish(config, dataset)
        finally:
            executor.close()


def _prompt_table(config: GeneratePairsConfig, table: Path) -> PromptTable:
    """Put the prompt table at ``table``: the one that is named, or one prepared from what is named."""
    source = config.prompts.path
    if is_prompt_table(source):
        storage, name = Storage.of_file(source)
        storage.download(name, table)
    else:
        info = prepare_prompts(config.prompts, table).info
        dropped = ", ".join(f"{reason} {number:,}" for reason, number in info.dropped.items() if number) or "none"
        print(f"{source}: {info.count:,} prompts; dropped: {dropped}")
    return PromptTable.open(*Storage.of_file(str(table)))


def _resolve(config: GeneratePairsConfig, prompts: PromptTable) -> Run:
    """The identity of the dataset the config asks for."""
    settings, layout = config.spec, config.layout
    available = prompts.num_prompts * settings.pairs_per_prompt
    num_samples = settings.num_samples or available
    if num_samples > available:
        raise UserError(
            f"spec.num_samples: {num_samples:,} asked, {prompts.num_prompts:,} prompts x {settings.pairs_per_prompt} "
            f"pairs_per_prompt give {available:,}; raise spec.pairs_per_prompt or add prompts"
        )
    num_shards = -(-num_samples // layout.samples_per_shard)
    if num_samples == 0:
        raise UserError(f"prompts.path: {config.prompts.path} has no prompt left to sample")
    if num_samples > MAX_SAMPLES or num_shards > MAX_SHARDS:
        raise UserError(
            f"layout.samples_per_shard: {num_samples:,} samples in {num_shards:,} shards; a dataset holds at most "
            f"{MAX_SAMPLES:,} samples in {MAX_SHARDS:,} shards"
        )
    spec = PairsSpec(
        **{
            **settings.model_dump(),
            "num_samples": num_samples,
            "teacher": teachers.identify(config.teacher),
            "prompts_digest": prompts.digest,
        }
    )
    return Run(
        fingerprint=fingerprint(spec),
        spec=spec,
        layout=layout,
        num_shards=num_shards,
        teacher=config.teacher,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_revision=code_revision(),
    )


def _executor(config: GeneratePairsConfig, root: str) -> Executor:
    make_worker = partial(PairWorker, root, config.teacher, config.runtime)
    if config.runtime.executor == "ray":
        try:
            from pipeline.ray_executor import RayExecutor
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise UserError(
                "runtime.executor: ray is not installed; pip install 'potstill[ray]' or choose in-process"
            ) from None
        return RayExecutor(make_worker, config.runtime)
    from pipeline.in_process_executor import InProcessExecutor

    return InProcessExecutor(make_worker, config.runtime)


def _make_missing_shards(
    config: GeneratePairsConfig, dataset: Dataset, executor: Executor, lease: Lease, stop: StopRequest
) -> None:
    runtime, run = config.runtime, dataset.run
    committed = dataset.committed()
    missing = [shard for shard in range(run.num_shards) if shard not in committed]
    num_done = run.spec.num_samples - sum(len(run.sample_ids(shard)) for shard in missing)
    dataset.unpark()
    print(
        f"{dataset.storage.uri}: {len(committed)} of {run.num_shards} shards exist, {len(missing)} to make", flush=True
    )
    progress = Progress(dataset, lease, num_done, runtime.progress_period_s, runtime.max_rejected_fraction)
    outcome = "failed"
    try:
        parked = drive(
            executor,
            missing,
            progress,
            stop,
            max_errors_per_shard=runtime.max_errors_per_shard,
            max_crashes_per_shard=runtime.max_crashes_per_shard,
        )
        outcome = "interrupted" if stop.requested else "parked" if parked else "complete"
    except RunStopped as error:
        outcome = f"stopped: {error}"
        raise
    finally:
        with suppress(OSError):  # the report of a full disk may not fit on it; the cause is on its way up already
            progress.close(outcome)
    if stop.requested:
        raise RunStopped("on request; committed shards are kept, run the same command again to go on")
    if parked:
        raise RunStopped(
            f"{len(parked)} of {run.num_shards} shards are parked, reasons in {dataset.storage.uri}/parked/; "
            "mend the cause, then run the same command again"
        )


def _finish(config: GeneratePairsConfig, dataset: Dataset) -> None:
    summary = write_manifest(dataset)
    allowed = config.runtime.max_rejected_fraction * dataset.run.spec.num_samples
    if summary["num_rejected"] > allowed:
        raise RunStopped(
            f"{summary['num_rejected']:,} of {dataset.run.spec.num_samples:,} samples are rejected "
            f"({summary['rejected_by_reason']}), not sealed; to accept that raise runtime.max_rejected_fraction"
        )
    write_card(dataset, summary)
    seal(dataset, summary)
    print(
        f"{dataset.storage.uri}: complete, {summary['num_samples']:,} pairs in {summary['num_shards']:,} shards, "
        f"{summary['num_bytes'] / 1e6:,.1f} MB, {summary['num_rejected']:,} rejected; see README.md there"
    )
