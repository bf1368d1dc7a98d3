"""Run the teacher again on some stored samples: does the dataset hold what its spec says?

Samples are spread evenly over the dataset. x0 is compared by its relative rms difference, |a - b| / |b|: zero on the
machine that made it with the same batch, small on another, about 1.4 for another teacher or other settings. What was
made alone with float32 networks, because half precision overflowed, is made so again.

Where x0 is not stored the picture is compared, after the same encoding: jpg loses what it lost the first time.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from configs.errors import UserError
from configs.schema import PairsRuntime, PairsSpec, TeacherConfig
from pipeline.noise import noise
from pipeline.sampling import load_teacher, sample_batch
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_index
from pipeline.shards.members import decode_array, decode_image, encode_image, split_members, to_uint8
from pipeline.shards.records import Commit
from pipeline.teachers.base import Teacher

_BATCH_SIZE = 16


@dataclass(frozen=True)
class Comparison:
    """One stored sample against the teacher's output now.

    Attributes:
        key: the sample's key.
        shard: number of its shard.
        relative_rms: |now - stored| / |stored| over x0, or over the image's values in [0, 255] if x0 is not stored;
            infinite if the teacher's output is not finite now.
    """

    key: str
    shard: int
    relative_rms: float


def deep_verify(
    dataset: Dataset, commits: list[Commit], num_samples: int, teacher_config: TeacherConfig
) -> list[Comparison]:
    """Sample again and compare.

    Args:
        dataset: the dataset.
        commits: records of shards that are whole.
        num_samples: how many samples of these shards, at least 1; fewer if they hold fewer.
        teacher_config: where the teacher lies now.

    Raises:
        UserError: the teacher is not that of the dataset, or no sample is stored yet.
        DamagedShard: an index that was just checked has gone.
    """
    spec, storage = dataset.run.spec, dataset.storage
    chosen = _choose(dataset, commits, num_samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparisons: list[Comparison] = []
    teacher = load_teacher(teacher_config, spec, device, PairsRuntime())  # outside: its weights may yet be widened
    with torch.inference_mode():
        for batch in _batches(chosen):
            with teacher.float32() if batch[0]["made_in_float32"] else nullcontext():
                outputs = _sample(teacher, spec, batch)
            for row, output in zip(batch, outputs, strict=True):
                members = split_members(storage.read_range(row["path"], row["offset"], row["length"]))
                now, stored = _comparable(spec, output, members)
                difference = np.linalg.norm(now - stored) / max(float(np.linalg.norm(stored)), 1e-12)
                relative_rms = float(difference) if np.isfinite(difference) else math.inf
                comparisons.append(Comparison(row["key"], row["shard"], relative_rms))
    return comparisons


def _choose(dataset: Dataset, commits: list[Commit], num_samples: int) -> list[dict[str, Any]]:
    """Index rows, with the path of their shard, of samples spread evenly over all that are stored."""
    ends = list(accumulate(commit.num_samples for commit in commits))
    total = ends[-1] if ends else 0
    if total == 0:
        why = "every sample was rejected" if commits else "there is no whole shard"
        raise UserError(f"--deep: {dataset.storage.uri}: {why}, so nothing can be compared; make some first")
    count = min(num_samples, total)
    positions: dict[int, list[int]] = {}
    for n in (i * total // count for i in range(count)):
        at = bisect_right(ends, n)
        positions.setdefault(at, []).append(n - (ends[at] - commits[at].num_samples))
    chosen: list[dict[str, Any]] = []
    for at, wanted in positions.items():
        rows = [row for row in read_index(dataset, commits[at]).to_pylist() if row["status"] == "ok"]
        chosen += [{**rows[position], "path": commits[at].path} for position in wanted]
    return chosen


def _batches(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Batches of what was made in a batch; alone what was made alone."""
    together = [row for row in rows if not row["made_in_float32"]]
    for start in range(0, len(together), _BATCH_SIZE):
        yield together[start : start + _BATCH_SIZE]
    for row in rows:
        if row["made_in_float32"]:
            yield [row]


def _sample(teacher: Teacher, spec: PairsSpec, rows: list[dict[str, Any]]) -> NDArray[np.float32]:
    """What the teacher makes of these rows now: latents where they are stored, else images; (B, ...)."""
    ids = [int(row["key"]) for row in rows]
    noises = np.stack([noise(spec.seed, i, spec.teacher.sample_shape) for i in ids])
    condition = teacher.encode_prompts([row["prompt"] for row in rows])
    unconditional = teacher.encode_prompts([spec.negative_prompt])
    x0 = sample_batch(teacher, spec, noises, condition, unconditional, ids)
    return (x0 if spec.fields.x0 == "latent" else teacher.decode(x0)).float().cpu().numpy()


def _comparable(
    spec: PairsSpec, output: NDArray[np.float32], members: dict[str, bytes]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The teacher's output for one sample as it would be stored, and what is stored."""
    kind = spec.fields.image
    if spec.fields.x0 != "none":
        stored = decode_array(members["x0.npy"])
        return output.astype(stored.dtype).astype(np.float32), stored.astype(np.float32)
    if not np.isfinite(output).all():
        return output, np.zeros_like(output)
    now = decode_image(encode_image(to_uint8(output), kind))
    return now.astype(np.float32), decode_image(members[kind]).astype(np.float32)
