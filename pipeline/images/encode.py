"""From a config to a finished dataset of real images: list the source, then drive.

Everything a user can have got wrong is checked before the output is touched: config, source, autoencoder, resources.
The rest is a :class:`pipeline.dataset_run.DatasetRun`, as for pairs.
"""

import tempfile
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from configs.encode_schema import EncodeImagesConfig, ImagesSpec
from configs.errors import UserError
from configs.fingerprint import fingerprint
from pipeline.dataset_run import KEPT, DatasetRun, num_shards
from pipeline.driver import Executor
from pipeline.executors import make_executor
from pipeline.full_disk import full_disk_stops
from pipeline.images.card import write_image_card
from pipeline.images.encode_worker import EncodeWorker
from pipeline.images.source import listed, open_source
from pipeline.images.source_table import write_source_table
from pipeline.provenance import code_revision
from pipeline.shard_maker import ShardResult, preview_ids
from pipeline.shards.layout import SOURCES
from pipeline.shards.records import Run
from pipeline.shards.storage import Storage
from pipeline.teachers.latents import identify_latents


def encode_images(config: EncodeImagesConfig) -> None:
    """Bring the dataset at ``config.output`` to its end, from wherever it is.

    Raises:
        UserError: the config cannot work, or the output holds something else; nothing has been written.
        RunStopped: the run ended early or shards are parked; everything committed is kept.
    """
    config = _with_absolute_paths(config)
    storage = Storage.open(config.output)
    with tempfile.TemporaryDirectory() as folder, full_disk_stops(storage.uri, KEPT):
        table = Path(folder) / SOURCES
        run = _resolve(config, table)
        DatasetRun(
            storage=storage,
            run=run,
            runtime=config.runtime,
            make_executor=partial(_executor, config, run, storage.uri),
            store_table=partial(storage.upload, SOURCES, table),  # the same images may lie elsewhere by now
            write_card=write_image_card,
        ).complete()


def _with_absolute_paths(config: EncodeImagesConfig) -> EncodeImagesConfig:
    """A worker has another working directory."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    update: dict[str, object] = {"source": config.source.model_copy(update={"path": absolute(config.source.path)})}
    if config.teacher is not None and Path(config.teacher.path).is_dir():
        update["teacher"] = config.teacher.model_copy(update={"path": absolute(config.teacher.path)})
    return config.model_copy(update=update)


def _resolve(config: EncodeImagesConfig, table: Path) -> Run:
    """Read the whole source, write its list to ``table``, and say which dataset the config asks for."""
    source = open_source(config.source)
    print(f"{config.source.path}: reading every image once, for the list", flush=True)
    info = write_source_table(table, listed(source))
    if not info.count:
        raise UserError(f"source.path: {config.source.path} holds no image")
    others = ", ".join(f"{name} {number:,}" for name, number in sorted(source.ignored.items())) or "none"
    print(f"{config.source.path}: {info.count:,} images, {len(source.classes):,} named classes; not images: {others}")
    latents = identify_latents(config.teacher, config.spec.image_size) if config.teacher is not None else None
    spec = ImagesSpec(
        **config.spec.model_dump(),
        num_samples=info.count,
        sources_digest=info.digest,
        classes=source.classes,
        latents=latents,
    )
    return Run(
        fingerprint=fingerprint(spec),
        spec=spec,
        layout=config.layout,
        num_shards=num_shards(info.count, config.layout.samples_per_shard),
        teacher=config.teacher,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        code_revision=code_revision(),
    )


def _executor(config: EncodeImagesConfig, run: Run, root: str) -> Executor[ShardResult]:
    previews = frozenset(preview_ids(run.spec.num_samples))
    make_worker = partial(EncodeWorker, root, run.fingerprint, config.source, config.teacher, config.runtime, previews)
    return make_executor(make_worker, config.runtime)
