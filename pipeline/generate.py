"""From a config to a finished dataset of pairs: look before you leap, then drive.

Everything a user can have got wrong is checked before the output is touched: config, output, prompts, teacher,
sampler, resources. The rest is a :class:`pipeline.dataset_run.DatasetRun`.
"""

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from configs.errors import UserError
from configs.fingerprint import fingerprint
from configs.schema import GeneratePairsConfig, PairsSpec
from pipeline import teachers
from pipeline.card import write_card
from pipeline.class_labels import CLASSES, write_labels
from pipeline.dataset_run import KEPT, DatasetRun, num_shards
from pipeline.driver import Executor
from pipeline.executors import make_executor
from pipeline.followed_worker import FollowedWorker, MakeFollower
from pipeline.full_disk import full_disk_stops
from pipeline.noise import check_noise_recipe
from pipeline.pairs import PairWorker
from pipeline.plan import print_plan
from pipeline.prompts import PromptTable, is_prompt_table, prepare_prompts
from pipeline.provenance import code_revision
from pipeline.shard_maker import ShardResult, preview_ids
from pipeline.shards.layout import PROMPTS
from pipeline.shards.records import Run
from pipeline.shards.storage import Storage


def generate_pairs(config: GeneratePairsConfig, followers: Sequence[MakeFollower] = ()) -> None:
    """Bring the dataset at ``config.output`` to its end, from wherever it is; or, with ``config.plan``, say its cost.

    Args:
        config: which dataset, and how.
        followers: what else each worker is to do with a shard that it has committed. Shards that exist already are not
            handed to them.

    Raises:
        UserError: the config cannot work, or the output holds something else; nothing has been written.
        RunStopped: the run ended early or shards are parked; everything committed is kept.
    """
    check_noise_recipe()
    config = _with_absolute_teacher(config)
    storage = Storage.open(config.output)
    teachers.check(config.teacher, config.spec)
    with tempfile.TemporaryDirectory() as folder, full_disk_stops(storage.uri, KEPT):
        table = Path(folder) / PROMPTS
        prompts = _prompt_table(config, storage, table)
        teachers.check_prompts(config.teacher, prompts)
        run = _resolve(config, prompts)
        if config.plan:
            print_plan(config, run, table)
            return
        DatasetRun(
            storage=storage,
            run=run,
            runtime=config.runtime,
            make_executor=partial(_executor, config, run, storage.uri, followers),
            store_table=partial(_store_prompts, storage, table, run),
            write_card=write_card,
        ).complete()


def _with_absolute_teacher(config: GeneratePairsConfig) -> GeneratePairsConfig:
    """A worker has another working directory: there a relative folder would be taken for a hub id."""
    path = getattr(config.teacher, "path", None)
    if path is None or not Path(path).is_dir():
        return config
    teacher = config.teacher.model_copy(update={"path": str(Path(path).resolve())})
    return config.model_copy(update={"teacher": teacher})


def _store_prompts(storage: Storage, table: Path, run: Run) -> None:
    """Put the prompt table beside the shards, in the place of none, of another or of a damaged one."""
    try:
        there = PromptTable.open(storage, PROMPTS)
        if there.digest == run.spec.prompts_digest:
            there.verify()  # a few seconds for a million prompts
            return
    except (UserError, OSError):  # none, not a prompt table, or a page of it cannot be read
        pass
    storage.upload(PROMPTS, table)


def _prompt_table(config: GeneratePairsConfig, output: Storage, table: Path) -> PromptTable:
    """Put the prompt table at ``table``: the one that is named, or one prepared from what is named.

    When the source is gone and the output has a table already, that one serves: it is what the samples refer to.
    """
    if config.prompts.path == CLASSES:
        spec, num_classes = config.spec, teachers.num_classes(config.teacher)
        write_labels(table, config.prompts, num_classes, spec.seed, spec.num_samples, spec.pairs_per_prompt)
        return PromptTable.open(*Storage.of_file(str(table)))
    storage, name = Storage.of_file(config.prompts.path)
    source = config.prompts.path
    if not storage.exists(name) and output.exists(PROMPTS):
        print(f"{source} is gone: using the table of the output")
        source = f"{output.uri}/{PROMPTS}"
        output.download(PROMPTS, table)
    elif is_prompt_table(config.prompts.path):
        filters = config.prompts.model_dump(exclude={"path", "column"}, exclude_defaults=True)
        if filters:
            raise UserError(
                f"prompts.{next(iter(filters))}: {config.prompts.path} is a prompt table and taken as it is; "
                "filter its source with stages/prepare_prompts.py, or leave the filter out"
            )
        storage.download(name, table)
    else:
        info = prepare_prompts(config.prompts, table).info
        dropped = ", ".join(f"{reason} {number:,}" for reason, number in info.dropped.items() if number) or "none"
        print(f"{config.prompts.path}: {info.count:,} prompts; dropped: {dropped}")
        return PromptTable.open(*Storage.of_file(str(table)))
    try:
        prompts = PromptTable.open(*Storage.of_file(str(table)))
        prompts.verify()  # nobody compares prompts and digest after this, and a worker would read what is there
    except (UserError, OSError) as error:
        raise UserError(f"prompts.path: {str(error).replace(str(table), source)}") from None
    return prompts


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
        num_shards=num_shards(num_samples, layout.samples_per_shard),
        teacher=config.teacher,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_revision=code_revision(),
    )


def _executor(
    config: GeneratePairsConfig, run: Run, root: str, followers: Sequence[MakeFollower]
) -> Executor[ShardResult]:
    previews = frozenset(preview_ids(run.spec.num_samples))
    make_pairs = partial(PairWorker, root, run.fingerprint, config.teacher, config.runtime, previews)
    make_followers = [partial(make_follower, root, run.fingerprint) for make_follower in followers]
    return make_executor(partial(FollowedWorker, make_pairs, make_followers), config.runtime)
