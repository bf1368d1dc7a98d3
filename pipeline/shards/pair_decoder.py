"""Noise and target of one sample, from its byte range of a shard straight into the rows of a batch.

A sample's range is a chain of ustar headers, each with a member's name and size (docs/shard_format.md); walking it
takes one small read a member, and the arrays follow with one read each. What the names do not bear out is damage: an
index that belongs to another tar is found here.
"""

import io
import math
import os
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from configs.schema import PairsSpec
from pipeline.noise import noise, noise_digest
from pipeline.shards.check_pairs import expected_suffixes, max_member_bytes
from pipeline.shards.layout import key
from pipeline.shards.members import decode_array, decode_image

Target = Literal["x0", "image"]
"""What a pair's target is: the teacher's x0, or the picture that its decoder makes of it."""

_BLOCK = 512
_HEAD = _BLOCK + 128
"""A member's header and the beginning of its content: that of an .npy file has 128 bytes for any shape we know."""


class StoredSample(NamedTuple):
    """A sample, and where it lies in its shard: as the index has it."""

    sample_id: int
    offset: int
    length: int
    noise_digest: str


class _Member(NamedTuple):
    """Where a member's content lies in the file, and how it begins."""

    start: int
    size: int
    head: bytes


class PairDecoder:
    """Decodes the samples of one dataset: x0 if it is stored, else the image.

    Attributes:
        target: x0 in the space of the noise, or an image in [-1, 1]: float pixels are not clipped, 8-bit ones are.
        noise_shape: of the noise, which is float16.
        target_shape: of the target.
        target_dtype: float16 or float32, as x0 is stored; float32 for 8-bit images.
    """

    def __init__(self, spec: PairsSpec) -> None:
        fields, teacher = spec.fields, spec.teacher
        self._spec = spec
        self._suffixes = expected_suffixes(spec)
        self._max_bytes = max_member_bytes(spec)
        self._member = fields.image if fields.x0 == "none" else "x0.npy"
        self.noise_shape = teacher.sample_shape
        self.target_shape = teacher.sample_shape if fields.x0 == "latent" else teacher.image_shape
        self.target_dtype = np.dtype("float32" if fields.x0 == "none" else fields.x0_dtype)
        in_own_space = fields.x0 != "none" and self.target_shape == self.noise_shape
        self.target: Target = "x0" if in_own_space else "image"
        self._noise_prefix = _npy_prefix(self.noise_shape, np.dtype(np.float16))
        self._x0_prefix = _npy_prefix(self.target_shape, self.target_dtype)

    def decode(self, file: int, sample: StoredSample, noise_out: NDArray[Any], target_out: NDArray[Any]) -> None:
        """Read one sample.

        Args:
            file: descriptor of the tar.
            sample: the sample.
            noise_out: (*noise_shape), float16; is written.
            target_out: (*target_shape), target_dtype; is written.

        Raises:
            ValueError: the bytes are not those of the sample.
        """
        members = self._walk(file, sample)
        if "noise.npy" in members:
            _read_array(file, members["noise.npy"], self._noise_prefix, noise_out)
        else:
            noise_out[...] = noise(self._spec.seed, sample.sample_id, self.noise_shape)
            if noise_digest(noise_out) != sample.noise_digest:
                raise ValueError("its noise is not that of the index")
        member = members[self._member]
        if self._member == "x0.npy":
            _read_array(file, member, self._x0_prefix, target_out)
        else:
            data = _read(file, member.start, member.size)
            image = decode_image(data, self._spec.teacher.image_shape[1:]).transpose(2, 0, 1)
            _expect_shape(image.shape, target_out)
            np.divide(image, np.float32(127.5), out=target_out)
            np.subtract(target_out, np.float32(1), out=target_out)

    def _walk(self, file: int, sample: StoredSample) -> dict[str, _Member]:
        """Where each member of a sample lies."""
        members: dict[str, _Member] = {}
        name, position = key(sample.sample_id), sample.offset
        for suffix in self._suffixes:
            head = os.pread(file, _HEAD, position)
            if not head.startswith(f"{name}.{suffix}\0".encode()):
                raise ValueError(f"there is no {suffix} where the index says")
            size = int(head[124:135], 8)
            if not 0 <= size <= self._max_bytes:
                raise ValueError(f"its {suffix} has {size:,} bytes, which no sample has")
            members[suffix] = _Member(position + _BLOCK, size, head[_BLOCK:])
            position += _BLOCK - (-size // _BLOCK) * _BLOCK
        if position != sample.offset + sample.length:
            raise ValueError("its length is not that of the index")
        return members


def _npy_prefix(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What an .npy file of such an array begins with, as this code writes it."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, dtype), allow_pickle=False)
    return buffer.getvalue()[: -math.prod(shape) * dtype.itemsize]


def _read_array(file: int, member: _Member, prefix: bytes, out: NDArray[Any]) -> None:
    """Fill ``out`` with an .npy member: without a copy if it begins as this code writes it."""
    if member.head.startswith(prefix) and member.size == len(prefix) + out.nbytes:
        if os.preadv(file, [out.data], member.start + len(prefix)) != out.nbytes:
            raise ValueError("the file ends within it")
        return
    array = decode_array(_read(file, member.start, member.size))
    if array.dtype != out.dtype:
        raise ValueError(f"found {array.dtype}, expected {out.dtype}")
    _expect_shape(array.shape, out)
    out[...] = array


def _read(file: int, start: int, size: int) -> bytes:
    data = os.pread(file, size, start)
    if len(data) != size:
        raise ValueError("the file ends within it")
    return data


def _expect_shape(shape: tuple[int, ...], out: NDArray[Any]) -> None:
    if shape != out.shape:
        raise ValueError(f"found shape {shape}, expected {out.shape}")
