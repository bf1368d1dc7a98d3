"""Datasets of random latents, written as a run writes them but without a teacher: quick to make, of any shape."""

from pathlib import Path
from typing import Any

import numpy as np

from configs.fingerprint import fingerprint
from configs.schema import FieldsConfig, MixtureTeacherConfig, PairsLayout, PairsSpec, PromptsConfig, TeacherIdentity
from pipeline.noise import noise, noise_digest
from pipeline.prompts import prepare_prompts
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import IndexRow, key
from pipeline.shards.manifest import seal, write_manifest
from pipeline.shards.members import Sample, encode_members
from pipeline.shards.records import Run, Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import ShardWriter, commit_shard

TIMING = Timing(
    attempt=1, host="", device="", started="", sample_seconds=0, total_seconds=0, code_revision="", versions={}
)


def write_latents(
    root: Path | str,
    folder: Path,
    *,
    num_samples: int,
    samples_per_shard: int,
    shape: tuple[int, ...] = (1, 2, 2),
    seed: int = 0,
    rejected: frozenset[int] = frozenset(),
    fields: dict[str, Any] | None = None,
) -> PairsSpec:
    """Write and seal a dataset, two pairs a prompt: x0 is one more than the noise, images are of one colour.

    Args:
        root: root of the dataset.
        folder: for temporary files.
        num_samples: samples, rejected ones included.
        samples_per_shard: samples of a shard.
        shape: of a latent.
        seed: of the noise.
        rejected: ids of samples that are not stored.
        fields: entries of ``spec.fields``.
    """
    table, text = folder / f"table-{num_samples}.parquet", folder / f"prompts-{num_samples}.txt"
    prompts = [f"prompt {i}" for i in range(-(-num_samples // 2))]
    text.write_text("\n".join(prompts) + "\n")
    info = prepare_prompts(PromptsConfig(path=str(text)), table).info
    spec = PairsSpec(
        sampler={"name": "ddim"},  # type: ignore[arg-type]
        seed=seed,
        pairs_per_prompt=2,
        num_samples=num_samples,
        fields=FieldsConfig.model_validate({"image": "none", **(fields or {})}),
        teacher=TeacherIdentity(
            kind="random",
            weights_digest="0" * 64,
            dtype="float32",
            parametrization="eps",
            schedule="edm",
            latent_scale=1.0,
            sample_shape=shape,
            image_shape=(3, 8, 8),
        ),
        prompts_digest=info.digest,
    )
    run = Run(
        fingerprint=fingerprint(spec),
        spec=spec,
        layout=PairsLayout(samples_per_shard=samples_per_shard),
        num_shards=-(-num_samples // samples_per_shard),
        teacher=MixtureTeacherConfig(),
        created="",
        code_revision="",
    )
    storage = Storage.open(str(root))
    dataset = Dataset.create_or_open(storage, run)
    storage.upload("prompts.parquet", table)
    for shard in range(run.num_shards):
        with ShardWriter(folder / "shard.tar") as writer:
            for i in run.sample_ids(shard):
                sample = _sample(run, shard, i, prompts[i // 2], i in rejected)
                if i in rejected:
                    writer.reject(sample.row)
                else:
                    writer.add(sample.row, encode_members(sample, spec, run.fingerprint))
            commit_shard(storage, run.fingerprint, shard, writer.finish(), TIMING)
    seal(dataset, write_manifest(dataset))
    return spec


def _sample(run: Run, shard: int, i: int, prompt: str, is_rejected: bool) -> Sample:
    spec = run.spec
    z = noise(spec.seed, i, spec.teacher.sample_shape)
    row = IndexRow(
        key=key(i),
        shard=shard,
        row=-1,
        offset=-1,
        length=0,
        prompt_id=f"{i // 2:016x}",
        prompt=prompt,
        prompt_truncated=False,
        seed=spec.seed,
        noise_digest=noise_digest(z),
        guidance_scale=spec.guidance_scale,
        made_in_float32=False,
        status="rejected" if is_rejected else "ok",
        reason="x0 is constant" if is_rejected else "",
    )
    x0 = (z.astype(spec.fields.x0_dtype) + 1) if spec.fields.x0 == "latent" else None
    image = np.full((8, 8, 3), i % 256, np.uint8) if spec.fields.image != "none" else None
    return Sample(row, z, x0, image, None)
