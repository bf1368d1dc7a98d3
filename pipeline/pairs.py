"""One shard of pairs, as a function of the dataset's spec and the shard's number.

Sample i of a dataset with seed s and prompt table P:

    z_i      = noise(s, i)                               float16; the sampler starts from exactly this value
    prompt_i = P[i // pairs_per_prompt]
    x0_i     = teacher's sampler(z_i, prompt_i)          float32
    stored   : what ``spec.fields`` names

Nothing depends on the worker, the retry or the host. The batch size changes x0 by rounding only. On one CPU
configuration the bytes of a shard are reproducible.

A sample that is not finite, constant or of a wrong shape is made once more, alone and in float32; if that does not
help it is listed as rejected with its reason. No sample is ever left out silently.

Writing, uploading and committing are :class:`pipeline.shard_maker.ShardMaker`'s, and so is the bound of memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import UserError
from configs.schema import PairsRuntime, TeacherConfig
from pipeline.noise import check_noise_recipe, noise, noise_digest
from pipeline.prompts import PromptTable
from pipeline.sampling import TeacherBatch, load_teacher, rejection_reasons, sample_batch
from pipeline.shard_maker import ShardMaker, ShardResult, open_shared_dataset
from pipeline.shards.layout import PROMPTS, IndexRow, key, preview_path
from pipeline.shards.members import Sample, encode_members, encode_preview, to_uint8


class PairWorker:
    """Makes shards of one dataset with one teacher on one device.

    Args:
        root: URI of a dataset that has its ``run.json`` and prompt table.
        fingerprint: of that dataset.
        teacher: where the teacher lies.
        runtime: batch size, temporary folder, devices. ``cpus_per_actor`` becomes this process's torch threads.
        previews: samples of which a small picture is stored for the data card.

    Raises:
        UserError: what this machine sees at ``root`` is not that dataset, or the teacher is not its teacher.
    """

    def __init__(
        self,
        root: str,
        fingerprint: str,
        teacher: TeacherConfig,
        runtime: PairsRuntime,
        previews: frozenset[int] = frozenset(),
    ) -> None:
        check_noise_recipe()
        torch.set_num_threads(max(1, round(runtime.cpus_per_actor)))
        self._dataset = open_shared_dataset(root, fingerprint)
        self._spec = self._dataset.run.pairs
        self._prompts = PromptTable.open(self._dataset.storage, PROMPTS)
        if self._prompts.digest != self._spec.prompts_digest:
            raise UserError(f"{root}/{PROMPTS}: not the prompt table of this dataset; run generate_pairs.py again")
        self._runtime = runtime
        device = torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu")
        self._teacher = load_teacher(teacher, self._spec, device, runtime)
        with torch.inference_mode():
            self._unconditional = self._teacher.encode_prompts([self._spec.negative_prompt])
        self._previews = previews
        self._maker = ShardMaker(self._dataset, runtime, self._teacher.device)

    def run(self, shard: int, attempt: int = 1) -> ShardResult:
        """Make a shard and commit it, or adopt it if it exists. Raises as :meth:`ShardMaker.make`."""
        return self._maker.make(shard, attempt, self._samples, self._encode)

    def _samples(self, shard: int, ids: range) -> Iterator[Sample]:
        """The samples of a shard in order, sampled a batch at a time."""
        size = self._runtime.batch_size
        encoded: dict[str, Tensor] = {}
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            rows = self._rows(shard, batch)
            encoded = self._encode_prompts([row.prompt for row in rows], encoded)
            yield from self._sample(batch, rows, torch.cat([encoded[row.prompt] for row in rows]))

    def _encode_prompts(self, prompts: Sequence[str], encoded: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoding, (1, ...), of each distinct prompt; samples of a prompt follow each other, so the last batch's
        encodings are all that can be of use again.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in encoded]
        if new:
            encoded = {**encoded, **dict(zip(new, self._teacher.encode_prompts(new).split(1), strict=True))}
        return {prompt: encoded[prompt] for prompt in dict.fromkeys(prompts)}

    def _sample(self, ids: range, rows: Sequence[IndexRow], condition: Tensor) -> Iterator[Sample]:
        """One batch, on the device until it has been checked. A bad sample is made once more, alone and in float32."""
        spec, fields = self._spec, self._spec.fields
        noises = np.stack([noise(spec.seed, i, spec.teacher.sample_shape) for i in ids])
        truncated = self._teacher.truncated([row.prompt for row in rows])
        batch = self._run_teacher(noises, condition, self._unconditional, ids)
        reasons = rejection_reasons(batch, spec, len(ids))
        for at, (sample_id, reason) in enumerate(zip(ids, reasons, strict=True)):
            row = replace(rows[at], noise_digest=noise_digest(noises[at]), prompt_truncated=truncated[at])
            one = batch.one(at)
            if reason is not None:
                with self._teacher.float32():
                    again = self._teacher.encode_prompts([row.prompt])
                    unconditional = self._teacher.encode_prompts([spec.negative_prompt])
                    one = self._run_teacher(noises[at : at + 1], again, unconditional, ids[at : at + 1])
                (reason,) = rejection_reasons(one, spec, 1)
                row = replace(row, made_in_float32=True)
            if reason is not None:
                yield Sample(replace(row, status="rejected", reason=reason), noises[at], None, None, None)
                continue
            image = one.image
            if image is None and sample_id in self._previews:
                decoded = self._teacher.decode(one.x0)
                image = decoded if decoded.isfinite().all() else None
            x0 = {"latent": one.x0, "pixels": one.image, "none": None}[fields.x0]
            embedding = one.condition if fields.text_embedding else None
            yield Sample(
                row=row,
                noise=noises[at],
                x0=None if x0 is None else x0[0].cpu().numpy().astype(fields.x0_dtype),
                image=None if image is None else to_uint8(image[0].cpu().numpy()),
                text_embedding=None if embedding is None else embedding[0].cpu().numpy().astype(np.float16),
            )

    def _run_teacher(
        self, noises: NDArray[np.float16], condition: Tensor, unconditional: Tensor, ids: Sequence[int]
    ) -> TeacherBatch:
        x0 = sample_batch(self._teacher, self._spec, noises, condition, unconditional, ids)
        is_stored = self._spec.fields.image != "none" or self._spec.fields.x0 == "pixels"
        return TeacherBatch(x0, self._teacher.decode(x0) if is_stored else None, condition)

    def _rows(self, shard: int, ids: range) -> list[IndexRow]:
        """Index rows of samples; place, truncation, noise digest and status are filled in later."""
        spec = self._spec
        first, last = ids[0] // spec.pairs_per_prompt, ids[-1] // spec.pairs_per_prompt
        prompt_ids, prompts = self._prompts.rows(first, last + 1)
        rows: list[IndexRow] = []
        for i in ids:
            at = i // spec.pairs_per_prompt - first
            rows.append(
                IndexRow(
                    key=key(i),
                    shard=shard,
                    row=-1,
                    offset=-1,
                    length=0,
                    prompt_id=prompt_ids[at],
                    prompt=prompts[at],
                    prompt_truncated=False,
                    seed=spec.seed,
                    noise_digest="",
                    guidance_scale=spec.guidance_scale,
                    made_in_float32=False,
                    status="ok",
                    reason="",
                )
            )
        return rows

    def _encode(self, sample: Sample) -> dict[str, bytes]:
        if sample.image is not None and int(sample.row.key) in self._previews:
            self._dataset.storage.write(preview_path(int(sample.row.key)), encode_preview(sample.image))
        return encode_members(sample, self._spec, self._dataset.run.fingerprint)
