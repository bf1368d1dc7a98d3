"""The real images that others are measured against, as statistics of their features.

FID takes mean and covariance. KID takes the features themselves, which not every source has, and its kernel
(f . g / dim + 1)^3 has a scale of its own, that of Inception's features, whose mean square is about 1. Of features far
longer than that only the cube is left, and of the mean over its huge values only noise.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import JsonValue

from configs.errors import UserError
from configs.evaluate_schema import EvaluateConfig
from pipeline.evaluation.results import KID_GIVEN
from pipeline.evaluation.scores import Scores
from pipeline.metrics.frechet import Statistics, named_features, named_statistics, read_npz
from pipeline.scoring.score_table import read_column
from pipeline.scoring.scorer import Scorer
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import RUN
from pipeline.shards.storage import Storage
from pipeline.teachers.builtin import JUDGE

CLEANFID = "cleanfid:"
BUILTIN = "builtin"
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_BATCH_SIZE = 64
MAX_MEAN_SQUARE = 10.0
"""Of features whose KID is given."""


@dataclass(frozen=True)
class Reference:
    """Real images in the features of a network.

    Attributes:
        statistics: for FID.
        features: (N, D) for KID; None when the source has none.
        source: where it is from, for people.
    """

    statistics: Statistics
    features: NDArray[np.float32] | None
    source: str

    @property
    def kid(self) -> str:
        """KID_GIVEN, or why there is no KID."""
        if self.features is None:
            return "not given: the reference is statistics without features"
        mean_square = float(np.square(self.features, dtype=np.float64).mean())
        if mean_square > MAX_MEAN_SQUARE:
            kernel = "its kernel (f . g / dim + 1)^3 is made for features whose mean square is about 1"
            return f"not given: {kernel}, and these have {mean_square:.3g}"
        return KID_GIVEN

    @property
    def about(self) -> dict[str, JsonValue]:
        """What numbers depend on."""
        digest = hashlib.sha256(self.statistics.mu.tobytes() + self.statistics.sigma.tobytes())
        return {"images": self.statistics.count, "digest": digest.hexdigest(), "kid": self.kid}

    @classmethod
    def of(cls, features: NDArray[np.float32], source: str) -> "Reference":
        """From the features of all images."""
        return cls(Statistics.of(features), features, source)

    @classmethod
    def read(cls, path: Path, source: str) -> "Reference":
        """From an ``.npz`` with mu, sigma and perhaps count and features."""
        statistics = Statistics.read(path)
        features = read_npz(path, ()).get("features")
        if features is not None and features.shape[1:] != statistics.mu.shape:
            raise UserError(f"{path}: features {features.shape} are not of {len(statistics.mu)} numbers each")
        return cls(statistics, None if features is None else features.astype(np.float32), source)

    @classmethod
    def published(cls, name: str, mode: str) -> "Reference":
        """What clean-fid publishes: ``NAME/RESOLUTION/SPLIT``; of few datasets it publishes features too."""
        try:
            dataset, resolution, split = name.split("/")
        except ValueError:
            raise UserError(
                f"reference: {CLEANFID}{name} is not {CLEANFID}NAME/RESOLUTION/SPLIT, as in {CLEANFID}cifar10/32/train"
            ) from None
        statistics = named_statistics(dataset, resolution, split, mode)
        features = named_features(dataset, resolution, split, mode)
        return cls(statistics, features, f"clean-fid {name}, {mode}")


def open_reference(config: EvaluateConfig, scores: Scores) -> Reference | None:
    """Find the reference that a config names, and measure it if it is images.

    Args:
        config: of the evaluation.
        scores: makes the features of images.

    Raises:
        UserError: it is not there, is no such thing, is not finished, has an image that cannot be read or measured, or
            is of other features.
    """
    source = config.reference
    if source is None:
        return None
    if source.startswith(CLEANFID):
        if config.features.kind != "inception_features":
            raise UserError(
                f"reference: {source} has Inception's features, and features.kind is {config.features.kind}"
            )
        return Reference.published(source.removeprefix(CLEANFID), config.features.mode)
    path = JUDGE / "reference.npz" if source == BUILTIN else Path(source).expanduser()
    if path.suffix == ".npz":
        return Reference.read(path, source)
    storage = Storage.open(source if "://" in source else str(path.absolute()))
    if storage.exists(RUN):
        dataset = Dataset.open_any(storage)
        if dataset.sealed is None:
            raise UserError(
                f"reference: {source} is not finished, so its images are not all there; run the command that makes it "
                "again, or name a finished one"
            )
        scores.make_one(dataset, scores.features)
        return Reference.of(read_column(dataset, scores.features, "features"), source)
    return Reference.of(_features_of_folder(path, scores.scorer(scores.features), Storage.open(config.output)), source)


def _features_of_folder(folder: Path, scorer: Scorer, output: Storage) -> NDArray[np.float32]:
    """Features of every image below a folder in order of their paths; kept in the evaluation's folder."""
    if not folder.is_dir():
        raise UserError(f"reference: there is no {folder}; name an .npz, a folder of images or a pair dataset")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"reference: {folder} holds no image ({', '.join(sorted(_SUFFIXES))}); name one that does")
    digest = hashlib.sha256(repr(scorer.identity).encode())
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    kept = f"reference/{digest.hexdigest()[:16]}.npy"
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch) / "features.npy"
        if output.exists(kept):
            output.download(kept, local)
            return np.load(local, allow_pickle=False)
        print(f"{folder}: {len(paths):,} real images to measure", flush=True)
        parts: list[NDArray[np.float32]] = []
        for start in range(0, len(paths), _BATCH_SIZE):
            images = [_read_image(path) for path in paths[start : start + _BATCH_SIZE]]
            try:
                parts.append(scorer(images, [""] * len(images))["features"])
            except UserError as error:
                raise UserError(f"reference: {folder}: {error}") from None
        features = np.concatenate(parts)
        np.save(local, features, allow_pickle=False)
        output.upload(kept, local)
    return features


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except Image.DecompressionBombError:
        raise UserError(f"reference: {path} has too many pixels to be read; remove it, or scale it down") from None
    except (OSError, SyntaxError) as error:
        raise UserError(f"reference: {path} is no image ({error}); remove it, or copy it again") from None
