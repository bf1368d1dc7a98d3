"""Run the teacher again on some stored samples: does the dataset hold what its spec says?

Samples are spread evenly over the dataset. x0 is compared by its relative rms difference, |a - b| / |b|: zero on the
machine that made it with the same batch, small on another, about 1.4 for another teacher or other settings.
"""

from dataclasses import dataclass

import numpy as np
import torch

from configs.schema import PairsRuntime, TeacherConfig
from pipeline.noise import noise
from pipeline.pairs import load_teacher, sample_batch
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_index
from pipeline.shards.members import decode_array, decode_image, split_members
from pipeline.shards.writer import DamagedShard

_BATCH_SIZE = 16


@dataclass(frozen=True)
class Comparison:
    """One stored sample against the teacher's output now.

    Attributes:
        key: the sample's key.
        relative_rms: |now - stored| / |stored| over x0, or over the image's values in [0, 255] if x0 is not stored.
    """

    key: str
    relative_rms: float


def deep_verify(dataset: Dataset, num_samples: int, teacher_config: TeacherConfig) -> list[Comparison]:
    """Sample again and compare.

    Args:
        dataset: at least one of its shards exists.
        num_samples: how many samples; fewer if the dataset has fewer.
        teacher_config: where the teacher lies now.

    Raises:
        UserError: the teacher is not that of the dataset.
        DamagedShard: an index or a shard that was just checked has gone.
    """
    spec, storage = dataset.run.spec, dataset.storage
    chosen = _choose(dataset, num_samples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    comparisons: list[Comparison] = []
    with torch.inference_mode():
        teacher = load_teacher(teacher_config, spec, device, PairsRuntime())
        unconditional = teacher.encode_prompts([spec.negative_prompt])
        for start in range(0, len(chosen), _BATCH_SIZE):
            batch = chosen[start : start + _BATCH_SIZE]
            ids = [int(row["key"]) for row in batch]
            noises = np.stack([noise(spec.seed, i, spec.teacher.sample_shape) for i in ids])
            with_image = spec.fields.x0 != "latent"
            prompts = [row["prompt"] for row in batch]
            x0, image, _ = sample_batch(teacher, spec, noises, prompts, unconditional, ids, with_image)
            for at, row in enumerate(batch):
                members = split_members(storage.read_range(row["path"], row["offset"], row["length"]))
                now = x0[at] if spec.fields.x0 == "latent" or image is None else image[at]
                if spec.fields.x0 == "none":
                    stored = decode_image(members[spec.fields.image]).transpose(2, 0, 1).astype(np.float32)
                    now = ((now + 1) * 127.5).round().clamp(0, 255)
                else:
                    stored = decode_array(members["x0.npy"]).astype(np.float32)
                difference = np.linalg.norm(now.float().cpu().numpy() - stored)
                comparisons.append(
                    Comparison(row["key"], float(difference / max(float(np.linalg.norm(stored)), 1e-12)))
                )
    return comparisons


def _choose(dataset: Dataset, num_samples: int) -> list[dict]:
    """Index rows, with the path of their shard, of stored samples spread evenly over the committed shards."""
    shards = sorted(dataset.committed())
    if not shards:
        raise DamagedShard(f"{dataset.storage.uri}: no shard exists yet")
    per_shard = dict.fromkeys(shards, 0)
    for i in range(num_samples):
        per_shard[shards[i * len(shards) // num_samples]] += 1
    chosen: list[dict] = []
    for shard, wanted in per_shard.items():
        commit = dataset.commit(shard) if wanted else None
        if commit is None:
            continue
        rows = [row for row in read_index(dataset, commit).to_pylist() if row["status"] == "ok"]
        wanted = min(wanted, len(rows))
        chosen += [{**rows[i * len(rows) // wanted], "path": commit.path} for i in range(wanted)]
    return chosen
