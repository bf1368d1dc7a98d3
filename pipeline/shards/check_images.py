"""What follows from the spec of a dataset of real images about its indices and members.

index    name, sha256 of the source, class and prompt are those of the list of images
members  json: every value;  txt: the prompt;  x0: shape, dtype, finite;  image: decodes to the right shape
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.encode_schema import ImagesSpec
from configs.json_text import parse_json
from pipeline.images.source_table import SourceTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.expectation import expect
from pipeline.shards.image_members import ABOUT, image_suffixes
from pipeline.shards.layout import SOURCES
from pipeline.shards.local_table import LocalTable
from pipeline.shards.members import decode_array, decode_image, is_finite, member_bound


class ImageContents:
    """Implements :class:`pipeline.shards.check_shard.Contents`.

    Args:
        dataset: of images.
        spec: its spec.
        sources: its list of images; None leaves what the index says of them unchecked.
    """

    def __init__(self, dataset: Dataset, spec: ImagesSpec, sources: LocalTable[SourceTable] | None) -> None:
        self._spec = spec
        self._fingerprint = dataset.run.fingerprint
        self._sources = sources
        self.suffixes = image_suffixes(spec.fields)
        self.max_bytes = member_bound(
            (3, spec.image_size, spec.image_size), spec.latents.sample_shape if spec.latents else ()
        )

    @staticmethod
    def table(dataset: Dataset, spec: ImagesSpec, folder: Path) -> LocalTable[SourceTable]:
        """A copy of the list of images in ``folder``. Raises FileNotFoundError if there is none."""
        return LocalTable(dataset, SOURCES, SourceTable, spec.sources_digest, folder)

    def rows(self, ids: range) -> Iterator[dict[str, object]]:
        """The columns of each sample that do not depend on what became of it."""
        if self._sources is None:
            yield from ({} for _ in ids)
            return
        for image in self._sources.reader.rows(ids.start, ids.stop):
            yield {
                "name": image.name,
                "source_sha256": image.sha256,
                "label": image.label,
                "prompt": image.prompt,
                **({"status": "rejected", "reason": image.fault} if image.fault else {}),
            }

    def check(self, shard: int, row: dict[str, Any], members: dict[str, bytes]) -> None:
        """Check the members of a stored sample. Raises DamagedShard, or ValueError where one cannot be decoded."""
        spec, where = self._spec, f"of {row['key']}"
        about = {**{name: row[name] for name in ABOUT}, "fingerprint": self._fingerprint}
        expect(shard, f"json {where}", parse_json(members["json"]), about)
        if "txt" in members:
            expect(shard, f"txt {where}", members["txt"].decode(), row["prompt"])
        if spec.latents is not None:
            x0 = decode_array(members["x0.npy"])
            expected = (spec.latents.sample_shape, np.dtype(spec.fields.x0_dtype))
            expect(shard, f"x0 {where}", (x0.shape, x0.dtype), expected)
            expect(shard, f"x0 {where} finite", is_finite(x0), True)
        if spec.fields.image != "none":
            image = decode_image(members[spec.fields.image], (spec.image_size, spec.image_size))
            expect(shard, f"image {where}", image.shape, (spec.image_size, spec.image_size, 3))
