"""The images of a dataset one after the other, and two datasets side by side."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics.paired import pixel_distance
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.manifest import read_commits, read_indices
from pipeline.shards.members import decode_image, split_members
from pipeline.shards.parallel import parallel_map
from pipeline.shards.split import stored_ids
from pipeline.shards.writer import DamagedShard

_PARALLEL_READS = 8

Images = Iterator[tuple[int, NDArray[np.uint8]]]
"""(sample id, (H, W, 3)), ids increasing."""


def all_stored_ids(dataset: Dataset) -> NDArray[np.int64]:
    """Ids of the images of a dataset, increasing; those of its tables of scores in order."""
    ids = [stored_ids(dataset.run, commit) for commit in read_commits(dataset)]
    return np.concatenate([np.zeros(0, np.int64), *ids])


def stored_images(dataset: Dataset) -> Images:
    """Every image, a few in memory at a time.

    Raises:
        DamagedShard: a shard or an index is missing or damaged.
    """
    commits = read_commits(dataset)
    for commit, index in zip(commits, read_indices(dataset, commits), strict=True):
        rows = [row for row in index.to_pylist() if row["status"] == "ok"]
        yield from parallel_map(partial(_image, dataset, commit.path), rows, _PARALLEL_READS)


def paired_distances(dataset: Dataset, other: Dataset) -> NDArray[np.float64]:
    """RMS difference in [-1, 1] of the images that both datasets have, (n,), in order of their ids."""
    others = stored_images(other)
    distances: list[float] = []
    there = next(others, None)
    for sample_id, image in stored_images(dataset):
        while there is not None and there[0] < sample_id:
            there = next(others, None)
        if there is not None and there[0] == sample_id:
            distances.append(float(pixel_distance(image[None], there[1][None])[0]))
    return np.array(distances)


def _image(dataset: Dataset, path: str, row: dict[str, Any]) -> tuple[int, NDArray[np.uint8]]:
    spec = dataset.run.spec
    try:
        members = split_members(dataset.storage.read_range(path, row["offset"], row["length"]))
        return int(row["key"]), decode_image(members[spec.fields.image], spec.teacher.image_shape[1:])
    except FileNotFoundError:
        raise DamagedShard(
            f"{dataset.storage.uri}/{path} is missing; if keep_images has removed it, remove {dataset.storage.uri} as "
            "well to have its images drawn again"
        ) from None
    except (OSError, KeyError, ValueError) as error:
        raise DamagedShard(f"{dataset.storage.uri}/{path}: sample {key(int(row['key']))}: {error}") from None
