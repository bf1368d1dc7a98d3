"""Is a committed shard what was written, and is what was written what the spec asks for?

    record   parses, belongs to this dataset
    index    sha256; one row per sample id of the shard, in order. All columns but ``made_in_float32``,
             ``prompt_truncated`` (its count excepted) and the reasons of rejections (those of the record) are derived
             again: prompts from the table, noise digests from seed and sample id
    tar      sha256; the members of every stored sample, complete, and they lie where the index says
    members  json: every value;  noise: its digest;  txt, cls: the prompt;  x0, text embedding: shape, dtype, finite;
             image: decodes to the right shape

One sequential pass over the tar; memory holds one sample.
"""

import hashlib
import io
import math
import tarfile
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from configs.json_text import parse_json
from configs.schema import PairsSpec
from pipeline.noise import noise, noise_digest
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import key
from pipeline.shards.local_prompts import LocalPrompts
from pipeline.shards.manifest import read_index
from pipeline.shards.members import decode_array, decode_image, prompt_suffix
from pipeline.shards.records import Commit
from pipeline.shards.writer import DamagedShard

_JSON_KEYS = ("key", "prompt_id", "seed", "noise_digest")
"""What the JSON member repeats from the index as it is."""
_MAX_OTHER_BYTES = 16 << 20
"""Of headers, of a text, and of a text embedding, whose shape the spec does not tell."""


def check_shard(dataset: Dataset, commit: Commit, prompts: LocalPrompts | None) -> None:
    """Check one committed shard.

    Args:
        dataset: the dataset.
        commit: the shard's record.
        prompts: the dataset's prompt table; None leaves the prompts of the index unchecked.

    Raises:
        DamagedShard: it is not what was written, or not what the spec asks for; names the shard and the first fault.
        OSError: the storage failed, which says nothing about the shard.
    """
    shard = commit.shard
    rows: list[dict[str, Any]] = read_index(dataset, commit).to_pylist()
    _check_index(dataset, commit, rows, prompts)
    try:
        source = dataset.storage.reader(commit.path)
    except FileNotFoundError:
        raise DamagedShard(f"shard {shard}: {commit.path} is missing") from None
    with source:
        hashing = _HashingReader(source)
        fault = _first_fault(dataset, shard, hashing, [row for row in rows if row["status"] == "ok"])
        while hashing.read(1 << 20):
            pass
    if hashing.sha256.hexdigest() != commit.sha256:
        size = f"{hashing.num_bytes:,} bytes of {commit.num_bytes:,}; " if hashing.num_bytes != commit.num_bytes else ""
        raise DamagedShard(f"shard {shard}: {commit.path} is damaged: {size}its sha256 is not the one recorded")
    if fault is not None:
        raise fault
    _expect(shard, "num_bytes of the commit record", commit.num_bytes, hashing.num_bytes)


def _check_index(dataset: Dataset, commit: Commit, rows: list[dict[str, Any]], prompts: LocalPrompts | None) -> None:
    """Compare the index with what follows from the spec and the commit record."""
    spec, shard = dataset.run.spec, commit.shard
    ids = dataset.run.sample_ids(shard)
    _expect(shard, "index keys", [row["key"] for row in rows], [key(i) for i in ids])
    rejected = [(row["key"], row["reason"]) for row in rows if row["status"] == "rejected"]
    _expect(shard, "rejected samples", rejected, [(entry.key, entry.reason) for entry in commit.rejected])
    stored = [row for row in rows if row["status"] == "ok"]
    _expect(shard, "number of samples", len(stored), commit.num_samples)
    _expect(shard, "number of truncated", sum(row["prompt_truncated"] for row in stored), commit.num_truncated)
    first, last = ids[0] // spec.pairs_per_prompt, ids[-1] // spec.pairs_per_prompt
    asked = prompts.rows(first, last + 1) if prompts is not None else None
    position = 0
    for i, row in zip(ids, rows, strict=True):
        expected: dict[str, object] = {
            "shard": shard,
            "seed": spec.seed,
            "guidance_scale": float(np.float32(spec.guidance_scale)),
            "noise_digest": noise_digest(noise(spec.seed, i, spec.teacher.sample_shape)),
        }
        if asked is not None:
            at = i // spec.pairs_per_prompt - first
            expected |= {"prompt_id": asked[0][at], "prompt": asked[1][at]}
        if row["status"] == "ok":
            expected |= {"row": position, "reason": ""}
            position += 1
        else:
            expected |= {"status": "rejected", "row": -1, "offset": -1, "length": 0}
        for name, value in expected.items():
            _expect(shard, f"{name} of {row['key']}", row[name], value)


def _first_fault(
    dataset: Dataset, shard: int, source: "_HashingReader", stored: list[dict[str, Any]]
) -> DamagedShard | None:
    """Walk the tar against the index. A fault is returned, not raised: the sha256, once known, may explain it."""
    spec, max_bytes = dataset.run.spec, max_member_bytes(dataset.run.spec)
    try:
        with tarfile.open(fileobj=source, mode="r|") as tar:
            for row in stored:
                members: dict[str, bytes] = {}
                start = end = 0
                for suffix in expected_suffixes(spec):
                    info = _next(tar)
                    name = f"{row['key']}.{suffix}"
                    if info is None or info.name != name or not info.isreg() or info.issparse():
                        raise DamagedShard(f"shard {shard}: member {name} is missing")
                    if info.size > max_bytes:  # before room is made for it
                        raise DamagedShard(f"shard {shard}: member {name} has {info.size:,} bytes, which no sample has")
                    start = start if members else info.offset
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    file = tar.extractfile(info)
                    members[suffix] = file.read() if file else b""
                _expect(shard, f"offset of {row['key']}", row["offset"], start)
                _expect(shard, f"length of {row['key']}", row["length"], end - start)
                _check_members(dataset, shard, row, members)
            if (extra := _next(tar)) is not None:
                raise DamagedShard(f"shard {shard}: member {extra.name} is not in the index")
    except DamagedShard as fault:
        return fault
    except (tarfile.TarError, ValueError, EOFError) as error:
        return DamagedShard(f"shard {shard}: cannot be read ({error})")
    return None


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The next member; ``tarfile`` would remember all of them, also of a stream that it cannot rewind."""
    info = tar.next()
    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
    return info


def expected_suffixes(spec: PairsSpec) -> list[str]:
    """The members of every sample, in the order in which they lie in a shard."""
    fields = spec.fields
    present = {
        "json": True,
        "noise.npy": fields.noise,
        "x0.npy": fields.x0 != "none",
        "text_embedding.npy": fields.text_embedding,
        prompt_suffix(spec): fields.prompt,
        fields.image: fields.image != "none",
    }
    return sorted(suffix for suffix, is_stored in present.items() if is_stored)


def max_member_bytes(spec: PairsSpec) -> int:
    """More than any member of an honest sample has, whatever its encoding: the bound of what is read at once."""
    numbers = max(math.prod(spec.teacher.sample_shape), math.prod(spec.teacher.image_shape))
    return 8 * numbers + _MAX_OTHER_BYTES


def _check_members(dataset: Dataset, shard: int, row: dict[str, Any], members: dict[str, bytes]) -> None:
    spec, where = dataset.run.spec, f"of {row['key']}"
    about = {name: row[name] for name in _JSON_KEYS}
    about |= {"guidance_scale": spec.guidance_scale, "fingerprint": dataset.run.fingerprint}
    found = parse_json(members["json"])
    _expect(shard, f"json keys {where}", sorted(found), sorted(about))
    for name, value in about.items():
        _expect(shard, f"json {name} {where}", found[name], value)
    if "noise.npy" in members:
        stored = decode_array(members["noise.npy"])
        _expect(shard, f"noise {where}", (stored.shape, stored.dtype), (spec.teacher.sample_shape, np.dtype("float16")))
        _expect(shard, f"noise {where}", noise_digest(stored.astype(np.float16)), row["noise_digest"])
    if "x0.npy" in members:
        x0 = decode_array(members["x0.npy"])
        shape = spec.teacher.image_shape if spec.fields.x0 == "pixels" else spec.teacher.sample_shape
        _expect(shard, f"x0 {where}", (x0.shape, x0.dtype), (shape, np.dtype(spec.fields.x0_dtype)))
        _expect(shard, f"x0 {where} finite", _is_finite(x0), True)
    if "text_embedding.npy" in members:
        embedding = decode_array(members["text_embedding.npy"])
        _expect(shard, f"text_embedding {where}", (embedding.ndim, embedding.dtype), (2, np.dtype("float16")))
        _expect(shard, f"text_embedding {where} finite", _is_finite(embedding), True)
    if spec.fields.prompt:
        suffix = prompt_suffix(spec)
        _expect(shard, f"{suffix} {where}", members[suffix].decode(), row["prompt"])
    if spec.fields.image != "none":
        channels, height, width = spec.teacher.image_shape
        image = decode_image(members[spec.fields.image], (height, width))
        _expect(shard, f"image {where}", image.shape, (height, width, channels))


def _is_finite(array: NDArray[Any]) -> bool:
    return bool(np.isfinite(array).all())


def _expect(shard: int, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise DamagedShard(f"shard {shard}: {what}: found {_short(found)}, expected {_short(expected)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _HashingReader(io.BufferedIOBase):
    """A sequential reader that hashes what passes through."""

    def __init__(self, source: BinaryIO) -> None:
        super().__init__()
        self._source = source
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._source.read(-1 if size is None else size)
        self.sha256.update(data)
        self.num_bytes += len(data)
        return data
