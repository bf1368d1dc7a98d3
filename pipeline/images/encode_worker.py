"""One shard of real images, as a function of the dataset's spec and the shard's number.

Sample i is image i of the list:

    image_i = resize(decode(source(i)))           8 bit, checked against the sha256 of the list first
    x0_i    = autoencoder's mean(image_i)         if latents are stored
    stored  : what ``spec.fields`` names

An image that cannot be decoded, or whose latent is not finite, is listed as rejected with its reason. Nothing depends
on the worker, the retry or the host. Memory: ``cpus_per_actor`` images as they are in the source, each with what it is
scaled through (:data:`pipeline.images.transforms.MAX_PIXELS` bounds both), a few batches of resized ones.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from configs.encode_schema import EncodeRuntime, ImageSource, ImagesSpec
from configs.errors import UserError
from configs.schema import StableDiffusionTeacherConfig
from pipeline.images.source import open_source, read_listed
from pipeline.images.source_table import SourceImage, SourceTable
from pipeline.images.transforms import BadImage, to_image
from pipeline.shard_maker import ShardMaker, ShardResult, open_shared_dataset
from pipeline.shards.image_members import ImageSample, encode_image_members
from pipeline.shards.layout import SOURCES, ImageRow, key, preview_path
from pipeline.shards.members import encode_preview
from pipeline.shards.parallel import parallel_map
from pipeline.teachers.latents import LatentEncoder, identify_latents

Prepared = tuple[SourceImage, NDArray[np.uint8] | None, str]
"""An image of the list, resized, or why it is not."""


class EncodeWorker:
    """Makes shards of one dataset of images on one device.

    Args:
        root: URI of a dataset that has its ``run.json`` and list of images.
        fingerprint: of that dataset.
        source: where the images lie.
        teacher: where the pipeline lies whose autoencoder makes latents; None if none are stored.
        runtime: batch size, temporary folder, devices. ``cpus_per_actor`` is the number of decoding threads.
        previews: samples of which a small picture is stored for the data card.

    Raises:
        UserError: what this machine sees at ``root`` is not that dataset, the source is not there, or the autoencoder
            is another one.
    """

    def __init__(
        self,
        root: str,
        fingerprint: str,
        source: ImageSource,
        teacher: StableDiffusionTeacherConfig | None,
        runtime: EncodeRuntime,
        previews: frozenset[int] = frozenset(),
    ) -> None:
        self._threads = max(1, round(runtime.cpus_per_actor))
        torch.set_num_threads(self._threads)
        self._dataset = open_shared_dataset(root, fingerprint)
        assert isinstance(self._dataset.run.spec, ImagesSpec)
        self._spec = self._dataset.run.spec
        if SourceTable.open(self._dataset.storage, SOURCES).digest != self._spec.sources_digest:
            raise UserError(f"{root}/{SOURCES}: not the images of this dataset; run encode_images.py again")
        self._source = open_source(source)
        self._batch_size = runtime.batch_size
        self._previews = previews
        device = torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu")
        self._encoder = None
        if teacher is not None:
            if identify_latents(teacher, self._spec.image_size) != self._spec.latents:
                raise UserError(f"teacher.path: {teacher.path} has not the autoencoder that the dataset was begun with")
            self._encoder = LatentEncoder(teacher, device)
        self._maker = ShardMaker(self._dataset, runtime, device)

    def run(self, shard: int, attempt: int = 1) -> ShardResult:
        """Make a shard and commit it, or adopt it if it exists. Raises as :meth:`ShardMaker.make`.

        Raises:
            UserError: an image is no longer what it was when it was listed.
        """
        return self._maker.make(shard, attempt, self._samples, self._encode)

    def _samples(self, shard: int, ids: range) -> Iterator[ImageSample]:
        """The samples of a shard in order, prepared a batch at a time."""
        images = SourceTable.open(self._dataset.storage, SOURCES).rows(ids.start, ids.stop)
        for start in range(0, len(ids), self._batch_size):
            batch = ids[start : start + self._batch_size]
            prepared = list(parallel_map(self._prepare, images[start : start + self._batch_size], self._threads))
            yield from self._finished(shard, batch, prepared)

    def _prepare(self, image: SourceImage) -> Prepared:
        if image.fault:
            return image, None, image.fault
        data = read_listed(self._source, image)
        try:
            return image, to_image(data, self._spec.image_size, self._spec.resize), ""
        except BadImage as error:
            return image, None, str(error)

    def _finished(self, shard: int, ids: range, prepared: Sequence[Prepared]) -> Iterator[ImageSample]:
        latents = self._latents([image for _, image, _ in prepared if image is not None])
        for sample_id, (source, image, reason) in zip(ids, prepared, strict=True):
            x0 = next(latents) if self._encoder is not None and image is not None else None
            if x0 is not None and not np.isfinite(x0).all():
                image, reason = None, "x0 is not finite"
            row = ImageRow(
                key=key(sample_id),
                shard=shard,
                row=-1,
                offset=-1,
                length=0,
                name=source.name,
                source_sha256=source.sha256,
                label=source.label,
                prompt=source.prompt,
                status="rejected" if image is None else "ok",
                reason=reason,
            )
            yield ImageSample(row, image, x0 if image is not None else None)

    def _latents(self, images: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.floating]]:
        """The latents of images in the stored dtype; none without an autoencoder."""
        if self._encoder is None or not images:
            return
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        with np.errstate(over="ignore"):  # what is beyond float16 is seen, and rejected, as infinite
            x0 = self._encoder(pixels).cpu().numpy().astype(self._spec.fields.x0_dtype)
        yield from x0

    def _encode(self, sample: ImageSample) -> dict[str, bytes]:
        if sample.image is not None and int(sample.row.key) in self._previews:
            self._dataset.storage.write(preview_path(int(sample.row.key)), encode_preview(sample.image))
        return encode_image_members(sample, self._spec.fields, self._dataset.run.fingerprint)
