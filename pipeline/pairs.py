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
uploaded while the next one is sampled. Memory is bounded by the batches in flight; of a finished sample only its index
row is held.
"""

import errno
import os
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import RunStopped, UserError
from configs.schema import PairsRuntime, TeacherConfig
from pipeline.noise import check_noise_recipe, noise, noise_digest
from pipeline.processes import has_ended, process_identity
from pipeline.prompts import PromptTable
from pipeline.provenance import code_revision, library_versions
from pipeline.sampling import TeacherBatch, load_teacher, max_rejected, rejection_reasons, sample_batch
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS, RUN, IndexRow, key, preview_path
from pipeline.shards.members import Sample, encode_members, encode_preview, to_uint8
from pipeline.shards.records import Commit, Timing
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard, ShardWriter, commit_shard

NUM_PREVIEWS = 24
"""Pictures on the data card."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_TEMP_PREFIX = "potstill-"
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
        threads = max(1, round(runtime.cpus_per_actor))
        torch.set_num_threads(threads)
        self._dataset = open_shared_dataset(root, fingerprint)
        self._spec = self._dataset.run.spec
        self._prompts = PromptTable.open(self._dataset.storage, PROMPTS)
        if self._prompts.digest != self._spec.prompts_digest:
            raise UserError(f"{root}/{PROMPTS}: not the prompt table of this dataset; run generate_pairs.py again")
        self._runtime = runtime
        device = torch.device("cuda" if runtime.gpus_per_actor > 0 else "cpu")
        self._teacher = load_teacher(teacher, self._spec, device, runtime)
        with torch.inference_mode():
            self._unconditional = self._teacher.encode_prompts([self._spec.negative_prompt])
        self._previews = previews
        self._temp_dir = Path(runtime.temp_dir or tempfile.gettempdir())
        self._temp_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale_files(self._temp_dir)
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="encode")
        self._device_lock = threading.Lock()

    def run(self, shard: int, attempt: int = 1) -> ShardResult:
        """Make a shard and commit it, or adopt it if it exists.

        Raises:
            OSError: the disk or the storage is full or away.
            RunStopped: so many samples are bad that something is broken; nothing of the shard is committed.
            DamagedShard: the local disk returns other bytes than were written.
        """
        existing = self._dataset.commit(shard)
        if existing is not None:
            return ShardResult(existing, adopted=True, device_seconds=0.0)
        started, clock = datetime.now(UTC), time.monotonic()
        ids = self._dataset.run.sample_ids(shard)
        path = self._temp_dir / f"{_TEMP_PREFIX}{process_identity(os.getpid())}-{shard:06d}-{time.monotonic_ns()}.tar"
        with _named_if_full(self._temp_dir), ShardWriter(path) as writer:
            pending: deque[Future[tuple[Sample, dict[str, bytes]]]] = deque()
            with self._device_lock, torch.inference_mode():
                held = time.monotonic()
                for sample in self._samples(shard, ids):
                    pending.append(self._encoders.submit(self._encode, sample))
                    in_flight = MAX_BATCHES_IN_FLIGHT * self._runtime.batch_size
                    while pending and (pending[0].done() or len(pending) > in_flight):
                        self._write(writer, pending.popleft())
                device_seconds = time.monotonic() - held
            while pending:
                self._write(writer, pending.popleft())
            written = writer.finish()
            if [row.key for row in written.rows] != [key(i) for i in ids]:
                raise DamagedShard(f"shard {shard}: {len(written.rows)} samples were made, {len(ids)} belong into it")
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
            commit = commit_shard(self._dataset.storage, self._dataset.run.fingerprint, shard, written, timing)
        return ShardResult(commit, adopted=commit.timing != timing, device_seconds=device_seconds)

    def _samples(self, shard: int, ids: range) -> Iterator[Sample]:
        """The samples of a shard in order, sampled a batch at a time."""
        rejected: Counter[str] = Counter()
        size = self._runtime.batch_size
        allowed = max_rejected(self._runtime.max_rejected_fraction, len(ids), self._spec.num_samples)
        encoded: dict[str, Tensor] = {}
        for start in range(0, len(ids), size):
            batch = ids[start : start + size]
            rows = self._rows(shard, batch)
            encoded = self._encode_prompts([row.prompt for row in rows], encoded)
            for sample in self._sample(batch, rows, torch.cat([encoded[row.prompt] for row in rows])):
                rejected.update([sample.row.reason] if sample.row.status == "rejected" else [])
                if rejected.total() > allowed:
                    reasons = ", ".join(f"{reason}: {count}" for reason, count in rejected.items())
                    raise RunStopped(
                        f"shard {shard}: {rejected.total()} of its first {len(ids[: start + size])} samples are bad "
                        f"({reasons}); mend the teacher or its dtype, or raise runtime.max_rejected_fraction"
                    )
                yield sample

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

    def _encode(self, sample: Sample) -> tuple[Sample, dict[str, bytes]]:
        if sample.image is not None and int(sample.row.key) in self._previews:
            self._dataset.storage.write(preview_path(int(sample.row.key)), encode_preview(sample.image))
        return sample, encode_members(sample, self._spec, self._dataset.run.fingerprint)

    def _write(self, writer: ShardWriter, future: Future[tuple[Sample, dict[str, bytes]]]) -> None:
        sample, members = future.result()
        if sample.row.status == "ok":
            writer.add(sample.row, members)
        else:
            writer.reject(sample.row)


def open_shared_dataset(root: str, fingerprint: str) -> Dataset:
    """The dataset at ``root`` as this machine sees it.

    Raises:
        UserError: it sees none, or another one.
    """
    host = socket.gethostname()
    storage = Storage.open(root)
    if not storage.exists(RUN):
        raise UserError(f"{root}: host {host} does not see it; a cluster of several machines needs a shared output")
    dataset = Dataset.open(storage)
    if dataset.run.fingerprint != fingerprint:
        raise UserError(f"{root}: on host {host} this is another dataset; a cluster needs a shared output")
    return dataset


@contextmanager
def _named_if_full(temp_dir: Path) -> Iterator[None]:
    """Name the disk in the error of a full one: writing to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, f"{socket.gethostname()}:{temp_dir}") from error


def _remove_stale_files(temp_dir: Path) -> None:
    """Remove what killed processes of this machine left behind; what another machine left is not ours to judge."""
    for stale in temp_dir.glob(f"{_TEMP_PREFIX}*.tar"):
        if has_ended("-".join(stale.name.removeprefix(_TEMP_PREFIX).split("-")[:4])):
            stale.unlink(missing_ok=True)


def _device_name(device: torch.device) -> str:
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
