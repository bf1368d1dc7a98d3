"""What follows from the spec of a dataset of pairs about its indices and members.

index    all columns but ``made_in_float32``, ``prompt_truncated`` (its count excepted) and the reasons of rejections
(those of the record) are derived again: prompts from the table, noise digests from seed and sample id
members  json: every value;  noise: its digest;  txt, cls: the prompt;  x0, text embedding: shape, dtype, finite;
image: decodes to the right shape
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.json_text import parse_json
from configs.schema import PairsSpec
from pipeline.noise import noise, noise_digest
from pipeline.prompts import PromptTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.expectation import expect
from pipeline.shards.layout import PROMPTS
from pipeline.shards.local_table import LocalTable
from pipeline.shards.members import decode_array, decode_image, is_finite, member_bound, prompt_suffix

_JSON_KEYS = ("key", "prompt_id", "seed", "noise_digest")
"""What the JSON member repeats from the index as it is."""


class PairContents:
    """Implements :class:`pipeline.shards.check_shard.Contents`.

    Args:
        dataset: of pairs.
        prompts: its prompt table; None leaves the prompts of the index unchecked.
    """

    def __init__(self, dataset: Dataset, prompts: LocalTable[PromptTable] | None) -> None:
        self._spec = dataset.run.pairs
        self._fingerprint = dataset.run.fingerprint
        self._prompts = prompts
        self.suffixes = expected_suffixes(self._spec)
        self.max_bytes = max_member_bytes(self._spec)

    @staticmethod
    def table(dataset: Dataset, folder: Path) -> LocalTable[PromptTable]:
        """A copy of the prompt table in ``folder``. Raises FileNotFoundError if there is none."""
        return LocalTable(dataset, PROMPTS, PromptTable, dataset.run.pairs.prompts_digest, folder)

    def rows(self, ids: range) -> Iterator[dict[str, object]]:
        """The columns of each sample that do not depend on what became of it."""
        spec = self._spec
        first, last = ids[0] // spec.pairs_per_prompt, ids[-1] // spec.pairs_per_prompt
        asked = self._prompts.reader.rows(first, last + 1) if self._prompts is not None else None
        for i in ids:
            columns: dict[str, object] = {
                "seed": spec.seed,
                "guidance_scale": float(np.float32(spec.guidance_scale)),
                "noise_digest": noise_digest(noise(spec.seed, i, spec.teacher.sample_shape)),
            }
            if asked is not None:
                at = i // spec.pairs_per_prompt - first
                columns |= {"prompt_id": asked[0][at], "prompt": asked[1][at]}
            yield columns

    def check(self, shard: int, row: dict[str, Any], members: dict[str, bytes]) -> None:
        """Check the members of a stored sample. Raises DamagedShard, or ValueError where one cannot be decoded."""
        spec, where = self._spec, f"of {row['key']}"
        about = {name: row[name] for name in _JSON_KEYS}
        about |= {"guidance_scale": spec.guidance_scale, "fingerprint": self._fingerprint}
        found = parse_json(members["json"])
        expect(shard, f"json keys {where}", sorted(found), sorted(about))
        for name, value in about.items():
            expect(shard, f"json {name} {where}", found[name], value)
        if "noise.npy" in members:
            stored = decode_array(members["noise.npy"])
            expect(
                shard, f"noise {where}", (stored.shape, stored.dtype), (spec.teacher.sample_shape, np.dtype("float16"))
            )
            expect(shard, f"noise {where}", noise_digest(stored.astype(np.float16)), row["noise_digest"])
        if "x0.npy" in members:
            x0 = decode_array(members["x0.npy"])
            shape = spec.teacher.image_shape if spec.fields.x0 == "pixels" else spec.teacher.sample_shape
            expect(shard, f"x0 {where}", (x0.shape, x0.dtype), (shape, np.dtype(spec.fields.x0_dtype)))
            expect(shard, f"x0 {where} finite", is_finite(x0), True)
        if "text_embedding.npy" in members:
            embedding = decode_array(members["text_embedding.npy"])
            expect(shard, f"text_embedding {where}", (embedding.ndim, embedding.dtype), (2, np.dtype("float16")))
            expect(shard, f"text_embedding {where} finite", is_finite(embedding), True)
        if spec.fields.prompt:
            suffix = prompt_suffix(spec)
            expect(shard, f"{suffix} {where}", members[suffix].decode(), row["prompt"])
        if spec.fields.image != "none":
            channels, height, width = spec.teacher.image_shape
            image = decode_image(members[spec.fields.image], (height, width))
            expect(shard, f"image {where}", image.shape, (height, width, channels))


def expected_suffixes(spec: PairsSpec) -> list[str]:
    """The members of every sample, in the order in which they lie in a shard."""
    fields = spec.fields
    present = {
        "json": True,
        "noise.npy": fields.noise,
        "x0.npy": fields.x0 != "none",
        "text_embedding.npy": fields.text_embedding,
        prompt_suffix(spec): fields.prompt,
        fields.image: fields.image != "none",
    }
    return sorted(suffix for suffix, is_stored in present.items() if is_stored)


def max_member_bytes(spec: PairsSpec) -> int:
    """More than any member of an honest sample has, whatever its encoding: the bound of what is read at once."""
    return member_bound(spec.teacher.sample_shape, spec.teacher.image_shape)
