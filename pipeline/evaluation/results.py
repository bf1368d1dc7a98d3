"""What an evaluation found: the content of ``report.json``.

``protocol`` is all that decides the numbers besides the system itself: two reports may be compared when they agree on
it. ``numbers`` are functions of protocol and images: the same evaluation again gives the same. Times are kept apart
from them, in ``timings``.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import JsonValue, ValidationError

from configs.errors import UserError
from configs.schema import Model
from pipeline.shards.storage import Storage

REPORT = "report.json"
FORMAT_VERSION = 1
KID_GIVEN = "given"
"""``protocol.reference.kid`` where there is a KID; elsewhere it says why there is none."""


class Timing(Model):
    """How long a batch takes, alone on one device; seconds."""

    batch_size: int
    """Images of a batch."""
    device: str
    """Its name, how the network was prepared for it, and the precision: only times that agree in all of it compare."""
    total: tuple[float, float, float]
    """Lower quartile, median, upper quartile of text encoder, network and decoder together."""
    text_encoder: float
    """Median of that part."""
    network: float
    """Likewise: the sampler with all its evaluations."""
    decoder: float
    """Likewise."""

    @property
    def images_per_second(self) -> float:
        """Of the median batch."""
        return self.batch_size / self.total[1]


class SystemResult(Model):
    """One row of the table."""

    name: str
    """``teacher-50``, ``student``; its folder in images/ and grid/."""
    title: str
    """For people."""
    family: str
    """What a plot joins to one curve: ``teacher`` at its step counts, a student alone."""
    is_student: bool
    """Or a teacher."""
    steps: int
    """Of the sampler."""
    evaluations: int
    """Network evaluations of one image, guidance included."""
    sampling: str
    """Sampler and guidance in words."""
    num_images: int
    """Images that were measured."""
    num_rejected: int
    """Images that were not finite, constant or of a wrong shape."""
    numbers: dict[str, float]
    """Metric (see :data:`METRICS`) -> value."""
    timings: tuple[Timing, ...]
    """Empty when they were not asked for, or no machine with the device has come to take them yet."""
    fingerprint: str
    """Of the dataset of its images."""
    content_sha256: str
    """Of their very bytes."""
    weights_digest: str
    """Of the pipeline they were drawn with."""

    @property
    def fastest(self) -> Timing | None:
        """At the batch size that gives most images a second."""
        return max(self.timings, key=lambda timing: timing.images_per_second, default=None)


class Report(Model):
    """What ``report.json`` says."""

    format_version: int = FORMAT_VERSION
    """Version of this layout."""
    title: str
    """Of the page."""
    protocol: dict[str, JsonValue]
    """What the numbers depend on besides the system."""
    systems: tuple[SystemResult, ...]
    """The teacher from many steps to few, then the student."""
    grid: dict[str, str]
    """Key of an image that is shown -> its prompt."""
    run: dict[str, JsonValue]
    """About the training run of the student; empty when there is none."""
    provenance: dict[str, JsonValue]
    """When, by which code and libraries."""

    def to_json(self) -> bytes:
        """The file."""
        return self.model_dump_json(indent=1).encode()


def read_report(storage: Storage) -> Report:
    """The report of an evaluation.

    Raises:
        UserError: there is none, or it is not what this program writes.
    """
    try:
        return Report.model_validate_json(storage.read(REPORT))
    except FileNotFoundError:
        raise UserError(f"{storage.uri}: no {REPORT}; name a folder in which stages/evaluate.py has ended") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{storage.uri}/{REPORT}: {where}: not what this version writes; evaluate that folder again"
        ) from None


class Metric(NamedTuple):
    """How a number is called and read.

    Attributes:
        title: of its column.
        digits: significant ones.
        better: ``lower``, ``higher``, or empty where neither is.
        meaning: in a sentence.
    """

    title: str
    digits: int
    better: str
    meaning: str


METRICS = {
    "frechet_distance": Metric("FID", 4, "lower", "Fréchet distance to real images in the features named below"),
    "kernel_distance": Metric("KID", 3, "lower", "kernel distance to real images in the same features"),
    "clip_score": Metric("CLIP score", 4, "higher", "mean cosine of image and prompt"),
    "accuracy": Metric("right", 4, "higher", "share of images whose nearest caption is the one asked for"),
    "paired_distance": Metric(
        "paired RMS", 3, "lower", "RMS difference, in [-1, 1], to the teacher's image of the same noise and prompt"
    ),
    "paired_cosine": Metric("paired cosine", 4, "higher", "cosine of the two images' features, mean over pairs"),
    "diversity": Metric("diversity", 3, "", "mean distance of features between images of one prompt"),
}
"""Name -> what it is. ``X_accuracy`` is the share that has the property X right."""


def metric(name: str) -> Metric:
    """What a number is, ``colour_accuracy`` and the like included."""
    if name in METRICS:
        return METRICS[name]
    label = name.removesuffix("_accuracy")
    return METRICS["accuracy"]._replace(title=f"{label} right", meaning=f"share of images with the {label} asked for")


def columns(systems: Sequence[SystemResult]) -> list[str]:
    """Names of the numbers that at least one system has, in the order of :data:`METRICS`."""
    found = {name for system in systems for name in system.numbers}
    order = list(METRICS)
    return sorted(found, key=lambda name: (order.index(name if name in METRICS else "accuracy"), name))


def reference_teacher(systems: Sequence[SystemResult]) -> SystemResult | None:
    """The teacher with most evaluations: what students are to be as good as."""
    return max((system for system in systems if not system.is_student), key=lambda one: one.evaluations, default=None)
