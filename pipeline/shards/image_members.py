"""What the members of a real image are, and their encoding.

    {key}.json                 which one it is: key, name, source_sha256, label, fingerprint
    {key}.x0.npy               the mean of the autoencoder's latents, in the space of a teacher's x0
    {key}.txt                  the prompt
    {key}.png | .webp | .jpg   the resized image, 8 bit

Which of them exist is the dataset's ``spec.fields``; ``json`` always does. They mean what they do in a dataset of pairs
(:mod:`pipeline.shards.members`). Encoding is deterministic.
"""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.encode_schema import ImageFields
from pipeline.shards.layout import ImageRow
from pipeline.shards.members import encode_image, npy

ABOUT = ("key", "name", "source_sha256", "label")
"""What the JSON member repeats from the index."""


@dataclass(frozen=True)
class ImageSample:
    """One real image on the host.

    Attributes:
        row: the sample's index row; its place in the shard is filled in by the writer.
        image: (S, S, 3), uint8; None for a rejected one.
        x0: the latents, in the stored dtype; None when they are not stored.
    """

    row: ImageRow
    image: NDArray[np.uint8] | None
    x0: NDArray[np.floating] | None


def encode_image_members(sample: ImageSample, fields: ImageFields, fingerprint: str) -> dict[str, bytes]:
    """The members of a sample by suffix, encoded; the same bytes for the same sample."""
    if sample.image is None:
        return {}
    about = {**{name: getattr(sample.row, name) for name in ABOUT}, "fingerprint": fingerprint}
    members = {"json": json.dumps(about, sort_keys=True).encode()}
    if sample.x0 is not None:
        members["x0.npy"] = npy(sample.x0)
    if fields.prompt:
        members["txt"] = sample.row.prompt.encode()
    if fields.image != "none":
        members[fields.image] = encode_image(sample.image, fields.image)
    return members


def image_suffixes(fields: ImageFields) -> list[str]:
    """The members of every sample, in the order in which they lie in a shard."""
    present = {
        "json": True,
        "x0.npy": fields.x0 != "none",
        "txt": fields.prompt,
        fields.image: fields.image != "none",
    }
    return sorted(suffix for suffix, is_stored in present.items() if is_stored)
