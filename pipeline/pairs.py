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

Calls of :meth:`PairWorker.run` may overlap: the device is held by one at a time, so a shard is encoded, written and
uploaded while the next one is sampled. Memory is bounded by the batches in flight, not by the shard.
"""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import PairsRuntime, PairsSpec, TeacherConfig
from pipeline import teachers
from pipeline.noise import check_noise_recipe, noise, noise_digest
from pipeline.prompts import PromptTable
from pipeline.provenance import code_revision, library_versions
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS, IndexRow, key, preview_path
from pipeline.shards.members import Sample, encode_members, encode_preview, to_uint8
from pipeline.shards.records import Commit, Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import ShardWriter, commit_shard
from pipeline.teachers.base import Teacher

NUM_PREVIEWS = 24
"""Pictures on the data card."""
MAX_BATCHES_IN_FLIGHT = 4
"""Sampled batches of a shard that may wait for the encoder: the bound of a worker's memory."""


@dataclass(frozen=True)
class ShardResult:
    """What a worker tells the driver about a shard: its commit record, and what came of this attempt.

    Attributes:
        commit: the record that stands.
        adopted: somebody else had committed the shard first.
        device_seconds: seconds the device was held by this attempt.
    """

    commit: Commit
    adopted: bool
    device_seconds: float


def preview_ids(num_samples: int) -> list[int]:
    """The samples shown on the data card: at most NUM_PREVIEWS, evenly spread over the dataset."""
    count = min(NUM_PREVIEWS, num_samples)
    return sorted({round(i * (num_samples - 1) / max(count - 1, 1)) for i in range(count)})


class PairWorker:
    """Makes shards of one dataset with one teacher on one device.

    Args:
        root: URI of a dataset that has its ``run.json`` and prompt table.
        teacher: where the teacher lies.
        runtime: batch size, temporary folder, devices.

    Raises:
        UserError: the teacher found is not the one of the dataset.
    """

    def __init__(self, root: str, teacher: TeacherConfig, runtime: PairsRuntime) -> None:
        check_noise_recipe()
        threads = max(1, round(runtime.cpus_per_actor))
        torch.set_num_threads(threads)
        self._dataset = Dataset.open(Storage.open(root))
        self._spec = self._dataset.run.spec
        self._prompts = PromptTable.open(self._dataset.storage, PROMPTS)
        self._runtime = runtime
        device = torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu")
        self._teacher = load_teacher(teacher, self._spec, device, runtime)
        with torch.inference_mode():
            self._unconditional = self._teacher.encode_prompts([self._spec.negative_prompt])
        self._previews = frozenset(preview_ids(self._spec.num_samples))
        self._temp_dir = _temp_dir(runtime.temp_dir, self._dataset.run.fingerprint)
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._device_lock = threading.Lock()

    def run(self, shard: int, attempt: int = 1) -> ShardResult:
        """Make a shard and commit it, or adopt it if it exists.

        Raises:
            OSError: the disk or the storage is full or away.
            DamagedShard: the local disk returns other bytes than were written.
        """
        existing = self._dataset.commit(shard)
        if existing is not None:
            return ShardResult(existing, adopted=True, device_seconds=0.0)
        started, clock = datetime.now(UTC), time.monotonic()
        path = self._temp_dir / f"{shard:06d}-{time.monotonic_ns()}.tar"
        with ShardWriter(path) as writer:
            pending: deque[Future[tuple[Sample, dict[str, bytes]]]] = deque()
            with self._device_lock, torch.inference_mode():
                held = time.monotonic()
                for batch in self._batches(self._dataset.run.sample_ids(shard)):
                    for sample in self._sample(batch):
                        pending.append(self._encoders.submit(self._encode, sample))
                    in_flight = MAX_BATCHES_IN_FLIGHT * self._runtime.batch_size
                    while pending and (pending[0].done() or len(pending) > in_flight):
                        self._write(writer, pending.popleft())
                device_seconds = time.monotonic() - held
            while pending:
                self._write(writer, pending.popleft())
            timing = Timing(
                attempt=attempt,
                host=socket.gethostname(),
                device=_device_name(self._teacher.device),
                started=started.isoformat(timespec="milliseconds"),
                sample_seconds=round(device_seconds, 3),
                total_seconds=round(time.monotonic() - clock, 3),
                code_revision=code_revision(),
                versions=library_versions(),
            )
            commit = commit_shard(self._dataset.storage, self._dataset.run.fingerprint, shard, writer.finish(), timing)
        return ShardResult(commit, adopted=commit.timing != timing, device_seconds=device_seconds)

    def _batches(self, ids: range) -> Iterator[range]:
        size = self._runtime.batch_size
        return (ids[start : start + size] for start in range(0, len(ids), size))

    def _sample(self, ids: range) -> list[Sample]:
        """Sample one batch; (B, ...) tensors stay on the device until they have been checked."""
        spec = self._spec
        rows = self._rows(ids)
        noises = np.stack([noise(spec.seed, i, spec.teacher.sample_shape) for i in ids])
        prompts = [row.prompt for row in rows]
        truncated = self._teacher.truncated(prompts)
        with_image = self._needs_image(ids)
        x0, image, condition = sample_batch(self._teacher, spec, noises, prompts, self._unconditional, ids, with_image)
        reasons = rejection_reasons(x0, image, spec.teacher.sample_shape, spec.teacher.image_shape)
        samples: list[Sample] = []
        for i, reason in enumerate(reasons):
            row = replace(rows[i], noise_digest=noise_digest(noises[i]), prompt_truncated=truncated[i])
            one = (x0[i : i + 1], image[i : i + 1] if image is not None else None, condition[i : i + 1])
            if reason is not None:
                one, reason = self._retry(noises[i : i + 1], prompts[i], ids[i : i + 1], with_image)
            if reason is not None:
                samples.append(Sample(replace(row, status="rejected", reason=reason), noises[i], None, None, None))
            else:
                samples.append(self._to_host(row, noises[i], *one))
        return samples

    def _retry(
        self, noises: NDArray[np.float16], prompt: str, ids: range, with_image: bool
    ) -> tuple[tuple[Tensor, Tensor | None, Tensor], str | None]:
        """A bad sample once more, alone and in float32, text encoder and decoder included."""
        spec = self._spec
        with self._teacher.float32():
            unconditional = self._teacher.encode_prompts([spec.negative_prompt])
            one = sample_batch(self._teacher, spec, noises, [prompt], unconditional, ids, with_image)
        return one, rejection_reasons(one[0], one[1], spec.teacher.sample_shape, spec.teacher.image_shape)[0]

    def _needs_image(self, ids: range) -> bool:
        fields = self._spec.fields
        return fields.image != "none" or fields.x0 == "pixels" or not self._previews.isdisjoint(ids)

    def _rows(self, ids: range) -> list[IndexRow]:
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
                    shard=i // self._dataset.run.layout.samples_per_shard,
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

    def _to_host(
        self, row: IndexRow, noises: NDArray[np.float16], x0: Tensor, image: Tensor | None, condition: Tensor
    ) -> Sample:
        fields = self._spec.fields
        source = {"latent": x0, "pixels": image, "none": None}[fields.x0]
        dtype = np.float16 if fields.x0_dtype == "float16" else np.float32
        return Sample(
            row=row,
            noise=noises,
            x0=None if source is None else source[0].cpu().numpy().astype(dtype),
            image=None if image is None else to_uint8(image[0].cpu().numpy()),
            text_embedding=condition[0].cpu().float().numpy().astype(np.float16) if fields.text_embedding else None,
        )

    def _encode(self, sample: Sample) -> tuple[Sample, dict[str, bytes]]:
        if sample.row.status == "ok" and int(sample.row.key) in self._previews and sample.image is not None:
            self._dataset.storage.write(preview_path(int(sample.row.key)), encode_preview(sample.image))
        return sample, encode_members(sample, self._spec.fields, self._dataset.run.fingerprint)

    def _write(self, writer: ShardWriter, future: Future[tuple[Sample, dict[str, bytes]]]) -> None:
        sample, members = future.result()
        if sample.row.status == "ok":
            writer.add(sample.row, members)
        else:
            writer.reject(sample.row)


def load_teacher(config: TeacherConfig, spec: PairsSpec, device: torch.device, runtime: PairsRuntime) -> Teacher:
    """Load a teacher and make sure that it is the one of ``spec``.

    Raises:
        UserError: it is another one; every field that differs is named.
    """
    teacher = teachers.load(config, device, compile=runtime.compile, channels_last=runtime.channels_last)
    teachers.check_identity(teacher.identity, spec.teacher, where="the dataset")
    return teacher


def sample_batch(
    teacher: Teacher,
    spec: PairsSpec,
    noises: NDArray[np.float16],
    prompts: Sequence[str],
    unconditional: Tensor,
    ids: Sequence[int],
    with_image: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run the teacher's sampler on one batch as ``spec`` says.

    Args:
        teacher: the teacher of ``spec``.
        spec: sampler, guidance_scale, seed.
        noises: (B, *sample_shape), float16, unit variance.
        prompts: B texts; equal ones are encoded once.
        unconditional: (1, ...), encoding of the negative prompt.
        ids: B sample ids, from which stochastic samplers derive their randomness.
        with_image: whether to decode.

    Returns:
        x0 (B, *sample_shape) float32, image (B, 3, H, W) float32 in [-1, 1] unclipped or None, condition (B, ...).
    """
    distinct = list(dict.fromkeys(prompts))
    encoded = teacher.encode_prompts(distinct)
    condition = encoded[[distinct.index(prompt) for prompt in prompts]] if len(distinct) < len(prompts) else encoded
    z = torch.from_numpy(noises).to(teacher.device, torch.float32)
    x0 = teacher.sample(
        z, condition, unconditional, spec.sampler, spec.guidance_scale, seed=spec.seed, sample_ids=list(ids)
    )
    return x0, teacher.decode(x0) if with_image else None, condition


def rejection_reasons(
    x0: Tensor, image: Tensor | None, sample_shape: Sequence[int], image_shape: Sequence[int]
) -> list[str | None]:
    """Why each sample of a batch cannot be kept, or None.

    Args:
        x0: (B, ...), any float dtype.
        image: (B, ...) or None.
        sample_shape: what x0 should look like without its batch dimension.
        image_shape: what an image should look like.
    """
    reasons: list[str | None] = [None] * len(x0)
    for name, batch, shape in (("x0", x0, sample_shape), ("image", image, image_shape)):
        if batch is None:
            continue
        if tuple(batch.shape[1:]) != tuple(shape):
            return [f"{name} has a wrong shape"] * len(x0)
        flat = batch.half().float().flatten(1)  # what float16 storage would make of it
        finite = flat.isfinite().all(1)
        constant = flat.amax(1) == flat.amin(1)
        for i, (is_finite, is_constant) in enumerate(zip(finite.tolist(), constant.tolist(), strict=True)):
            if reasons[i] is None and not is_finite:
                reasons[i] = f"{name} is not finite"
            elif reasons[i] is None and is_constant:
                reasons[i] = f"{name} is constant"
    return reasons


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"


def _temp_dir(parent: str | None, fingerprint: str) -> Path:
    """A folder of this process; those that killed processes of this dataset left behind are removed."""
    base = Path(parent or tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    prefix = f"potstill-{fingerprint[:8]}-{socket.gethostname()}-"
    for stale in base.glob(f"{prefix}*"):
        pid = stale.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(stale, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=base))
