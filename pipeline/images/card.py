"""The data card of a dataset of real images."""

from collections import Counter
from typing import Any

import pyarrow.compute as pc

from configs.encode_schema import ImagesSpec
from pipeline.card import HOW_TO_READ
from pipeline.contact_sheet import contact_sheet
from pipeline.images.source_table import SourceTable
from pipeline.markdown_table import markdown_row
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import CARD, CONTACT_SHEET, SOURCES
from pipeline.shards.manifest import read_commits, read_indices

_MAX_CLASSES = 20
"""Classes that are counted on the card; of more there is the number only."""


def write_image_card(dataset: Dataset, sealed: dict[str, Any]) -> None:
    """Write ``contact_sheet.png`` and ``README.md`` of a sealed dataset of images."""
    images = SourceTable.open(dataset.storage, SOURCES)

    def prompt_of(sample_id: int) -> str:
        (image,) = images.rows(sample_id, sample_id + 1)
        return image.prompt or image.name

    dataset.storage.write(CONTACT_SHEET, contact_sheet(dataset, prompt_of))
    dataset.storage.write(CARD, _card(dataset, sealed).encode())


def _card(dataset: Dataset, sealed: dict[str, Any]) -> str:
    """The text of the data card, in Markdown."""
    run, spec = dataset.run, dataset.run.spec
    assert isinstance(spec, ImagesSpec)
    rejected = ", ".join(f"{reason}: {count:,}" for reason, count in sealed["rejected_by_reason"].items()) or "none"
    stored = f"{sealed['num_samples']:,} in {sealed['num_shards']:,} shards of {run.layout.samples_per_shard:,}"
    rows = {
        "source": f"{spec.num_samples:,} images, digest `{spec.sources_digest}`",
        "images": f"{spec.image_size} x {spec.image_size}, resized by {spec.resize}",
        "classes": _classes(dataset, spec),
        "samples": f"{stored}, {sealed['num_bytes'] / 1e6:,.1f} MB",
        "rejected": f"{sealed['num_rejected']:,} ({rejected})",
        "fingerprint": f"`{run.fingerprint}`",
        "content": f"`{sealed['content_sha256']}`",
        "made with": f"{run.code_revision}, first run {run.created}",
    }
    if spec.latents is not None and run.teacher is not None:
        rows["autoencoder"] = f"{run.teacher.path}, `{spec.latents.weights_digest}`, {spec.latents.dtype}"
    table = "\n".join(map(markdown_row, rows.items()))
    members = "\n".join(markdown_row([f"`{suffix}`", what]) for suffix, what in _members(spec).items())
    return f"""# Real images

![some of the images](contact_sheet.png)

| | |
|---|---|
{table}

## A sample

Shards are plain WebDataset tars: `webdataset`, Hugging Face `datasets` and `ray.data` read them as they are.
Members of a sample, each named `KEY.SUFFIX` with a key of nine digits:

| suffix | content |
|---|---|
{members}

{HOW_TO_READ}
`index/*.parquet` has a row per image (key, offset, name, sha256 of its file, class, prompt, status), `manifest/` the
same for all shards at once, `sources.parquet` what was read. Only shards that `commits/` names exist;
`stages/verify_shards.py` checks them, `stages/status.py` counts them. As `reference` of `stages/evaluate.py` they are
the real images of FID and KID.
"""


def _classes(dataset: Dataset, spec: ImagesSpec) -> str:
    """Stored images of each class."""
    counts: Counter[int] = Counter()
    for index in read_indices(dataset, read_commits(dataset)):
        labels = index.filter(pc.equal(index["status"], "ok"))["label"]
        counts.update({row["values"]: row["counts"] for row in labels.value_counts().to_pylist()})
    del counts[-1]
    if not counts or len(counts) > _MAX_CLASSES:
        return f"{len(counts):,}" if counts else "none"
    names = [spec.classes[label] if spec.classes else str(label) for label in sorted(counts)]
    return ", ".join(f"{name} {counts[label]:,}" for name, label in zip(names, sorted(counts), strict=True))


def _members(spec: ImagesSpec) -> dict[str, str]:
    members = {"json": "key, name, source_sha256, label (-1: none), fingerprint"}
    if spec.latents is not None:
        shape = "x".join(map(str, spec.latents.sample_shape))
        scale = f"decoder input = x0 / {spec.latents.latent_scale:g}"
        members["x0.npy"] = f"{shape} {spec.fields.x0_dtype}, mean of the autoencoder's latents ({scale})"
    if spec.fields.prompt:
        members["txt"] = "the prompt, or the name of the class"
    if spec.fields.image != "none":
        members[spec.fields.image] = f"{spec.image_size} x {spec.image_size}, 8 bit RGB"
    return members
