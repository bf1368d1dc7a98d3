"""The JSON records of a dataset: ``run.json`` and ``commits/*.json``.

Records are read strictly: an unknown or missing key, or a shard number that is not the file's, is damage, not a
dialect. Both are pydantic models, so the schema is the code.
"""

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from configs.encode_schema import ImagesSpec
from configs.errors import RunStopped
from configs.schema import Model, PairsLayout, PairsSpec, TeacherConfig
from pipeline.shards.layout import commit_path

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A sha256 in hex."""


class DamagedRecord(RunStopped):
    """A JSON record of a dataset that cannot be what was written: names the file."""


class Timing(Model):
    """Who made a shard, and what it took. Says nothing about the content."""

    attempt: int
    """1 for the first try of a run."""
    host: str
    """Host name."""
    device: str
    """Torch device, and the name of the accelerator if it is one."""
    started: str
    """UTC time, ISO 8601."""
    sample_seconds: float
    """Seconds the device was held: encoding of prompts, sampling, decoding, checks."""
    total_seconds: float
    """Seconds from the start to the commit."""
    code_revision: str
    """Git revision of the code, or a digest of its sources; see pipeline/provenance.py."""
    versions: dict[str, str]
    """Versions of the libraries that touch the numbers."""


class Rejection(Model):
    """A sample that is not stored."""

    key: str
    """Key of the sample."""
    reason: str
    """Why."""


class Commit(Model):
    """A shard that exists."""

    shard: int
    """Number of the shard."""
    fingerprint: str
    """Fingerprint of the dataset."""
    path: Annotated[str, Field(pattern=r"^shards/[0-9a-f]{8}-\d{6}-[0-9a-f]{12}\.tar$")]
    """Path of the tar below the root; never one that leads out of it."""
    sha256: Sha256
    """Of the tar."""
    num_bytes: int
    """Of the tar."""
    index_path: Annotated[str, Field(pattern=r"^index/\d{6}-[0-9a-f]{12}\.parquet$")]
    """Path of the index below the root."""
    index_sha256: Sha256
    """Of the index."""
    num_samples: int
    """Samples in the tar."""
    num_truncated: int
    """Samples in the tar of whose prompt the text encoder read only the beginning."""
    rejected: list[Rejection]
    """Samples that are not."""
    timing: Timing
    """Who made it, and what it took."""

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return self.model_dump_json(indent=1).encode()

    @staticmethod
    def from_json(data: bytes, path: str) -> "Commit":
        """Read a record; ``path`` is named in the error.

        Raises:
            DamagedRecord: the bytes are no commit record, or that of another shard.
        """
        try:
            commit = Commit.model_validate_json(data)
        except ValidationError as error:
            raise DamagedRecord(f"{path}: not a commit record ({error.errors()[0]['msg']})") from None
        if path != commit_path(commit.shard):
            raise DamagedRecord(f"{path}: holds the commit record of shard {commit.shard}")
        return commit

    @property
    def rejected_by_reason(self) -> Counter[str]:
        """Number of rejected samples by reason."""
        return Counter(rejection.reason for rejection in self.rejected)


def _kind_of_spec(spec: object) -> str:
    is_images = isinstance(spec, ImagesSpec) or (isinstance(spec, dict) and "sources_digest" in spec)
    return "images" if is_images else "pairs"


class Run(Model):
    """What ``run.json`` says: the identity of a dataset, fixed at its first run."""

    fingerprint: str
    """sha256 of ``spec``; see configs/fingerprint.py."""
    spec: Annotated[
        Annotated[PairsSpec, Tag("pairs")] | Annotated[ImagesSpec, Tag("images")], Discriminator(_kind_of_spec)
    ]
    """The identity."""
    layout: PairsLayout
    """How samples are cut into shards."""
    num_shards: int
    """Number of shards."""
    teacher: TeacherConfig | None
    """Where the teacher lay at the first run, so that verification can find it again. Not part of the identity. Of real
    images: the pipeline whose autoencoder made the latents; None if there are none."""
    created: str
    """UTC time, ISO 8601."""
    code_revision: str
    """Git revision of the code that created it."""

    @model_validator(mode="after")
    def _counted(self) -> Self:
        expected = -(-self.spec.num_samples // self.layout.samples_per_shard)
        if self.num_shards != expected:
            raise ValueError(f"num_shards is {self.num_shards}, the samples make {expected}")
        return self

    @property
    def holds(self) -> Literal["pairs", "images"]:
        """What a sample is: a noise and what a teacher makes of it, or a real image."""
        return "images" if isinstance(self.spec, ImagesSpec) else "pairs"

    @property
    def made_by(self) -> str:
        """The script that makes what is missing."""
        return {"pairs": "generate_pairs.py", "images": "encode_images.py"}[self.holds]

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of a stored picture, in pixels."""
        spec = self.spec
        return spec.teacher.image_shape[1:] if isinstance(spec, PairsSpec) else (spec.image_size, spec.image_size)

    @property
    def what_to_mend(self) -> str:
        """Advice on samples that are bad."""
        return {"pairs": "mend the teacher or its dtype", "images": "mend the source or spec.resize"}[self.holds]

    @property
    def pairs(self) -> PairsSpec:
        """The spec of a dataset of pairs. Raises TypeError for one of images, which Dataset.open keeps out."""
        if not isinstance(self.spec, PairsSpec):
            raise TypeError("a dataset of images has no pairs")
        return self.spec

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return self.model_dump_json(indent=1).encode()

    def sample_ids(self, shard: int) -> range:
        """The sample ids of a shard: [shard * S, (shard + 1) * S), cut at the number of samples."""
        size = self.layout.samples_per_shard
        return range(shard * size, min((shard + 1) * size, self.spec.num_samples))
