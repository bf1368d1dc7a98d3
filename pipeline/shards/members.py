"""What a sample's members are, and their encoding.

    {key}.json                 who it is: key, prompt id, seed, noise digest, guidance_scale, fingerprint
    {key}.noise.npy            (*sample_shape) float16, unit variance: what the sampler started from
    {key}.x0.npy               teacher's output: latent (*sample_shape), or pixels (3, H, W) in [-1, 1] unclipped
    {key}.text_embedding.npy   (tokens, width) float16
    {key}.txt                  the prompt; of a class-conditional teacher instead
    {key}.cls                  the class, a decimal number
    {key}.png | .webp | .jpg   the decoded image, 8 bit

Which of them exist is the dataset's ``spec.fields``; ``json`` always does. Encoding is deterministic. Arrays are
plain ``.npy``: no member needs, or is ever read with, pickle.
"""

import io
import json
import math
import tarfile
import threading
import tokenize
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from configs.schema import PairsSpec
from pipeline.shards.layout import IndexRow

PREVIEW_PIXELS = 192
"""Longest side of a preview."""
_MAX_OTHER_BYTES = 16 << 20
"""Of headers, of a text, and of a text embedding, whose shape the spec does not tell."""

_PARSING = threading.Lock()
"""NumPy reads an array's header with ``ast.literal_eval``, whose depth CPython 3.11 counts once for all threads: when a
garbage-collection callback lets another thread in, a sound header ends in a SystemError."""


@dataclass(frozen=True)
class Sample:
    """One sampled pair on the host.

    Attributes:
        row: the sample's index row; its place in the shard is filled in by the writer.
        noise: (*sample_shape), float16.
        x0: (*sample_shape) or (3, H, W), in the stored dtype; None when it is not stored.
        image: (H, W, 3), uint8; None when there is no need of it.
        text_embedding: (tokens, width), float16; None when it is not stored.
    """

    row: IndexRow
    noise: NDArray[np.float16]
    x0: NDArray[np.floating] | None
    image: NDArray[np.uint8] | None
    text_embedding: NDArray[np.float16] | None


def to_uint8(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(3, H, W) float32 in [-1, 1] to (H, W, 3) uint8: rounded to nearest, clipped."""
    return ((image + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def prompt_suffix(spec: PairsSpec) -> str:
    """Suffix of the member that holds the prompt: ``cls`` for a class label, which readers take for a number."""
    return "cls" if spec.teacher.kind == "edm" else "txt"


def encode_members(sample: Sample, spec: PairsSpec, fingerprint: str) -> dict[str, bytes]:
    """The members of a sample by suffix, encoded; the same bytes for the same sample."""
    if sample.row.status != "ok":
        return {}
    row, fields = sample.row, spec.fields
    about = {
        "key": row.key,
        "prompt_id": row.prompt_id,
        "seed": row.seed,
        "noise_digest": row.noise_digest,
        "guidance_scale": row.guidance_scale,
        "fingerprint": fingerprint,
    }
    members = {"json": json.dumps(about, sort_keys=True).encode()}
    if fields.noise:
        members["noise.npy"] = npy(sample.noise)
    if sample.x0 is not None:
        members["x0.npy"] = npy(sample.x0)
    if sample.text_embedding is not None:
        members["text_embedding.npy"] = npy(sample.text_embedding)
    if fields.prompt:
        members[prompt_suffix(spec)] = row.prompt.encode()
    if fields.image != "none" and sample.image is not None:
        members[fields.image] = encode_image(sample.image, fields.image)
    return members


def encode_image(image: NDArray[np.uint8], kind: str) -> bytes:
    """(H, W, 3) uint8 as png (level 1: six times faster than the default, 17 % larger), lossless webp or jpg 95."""
    options: dict[str, Any] = {
        "png": {"format": "PNG", "compress_level": 1},
        "webp": {"format": "WEBP", "lossless": True, "method": 0, "exact": True},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    }[kind]
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, **options)
    return buffer.getvalue()


def encode_preview(image: NDArray[np.uint8]) -> bytes:
    """A PNG of at most PREVIEW_PIXELS on the longer side; small pictures stay as they are."""
    picture = Image.fromarray(image)
    picture.thumbnail((PREVIEW_PIXELS, PREVIEW_PIXELS), Image.Resampling.LANCZOS)
    return encode_image(np.asarray(picture), "png")


def split_members(tar: bytes) -> dict[str, bytes]:
    """The members by suffix of one sample's byte range of a shard (index columns ``offset`` and ``length``)."""
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = ((info.name.partition(".")[2], archive.extractfile(info)) for info in archive)
        return {suffix: file.read() for suffix, file in members if file is not None}


def decode_image(data: bytes, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """A png, webp or jpg member as (H, W, 3) uint8.

    Args:
        data: the member.
        size: the height and width that it must have; looked at before a pixel is decoded.

    Raises:
        ValueError: it is no image, or of another size.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG"))
        if size is not None and image.size != size[::-1]:
            raise ValueError(f"found an image of {image.height} x {image.width}, expected {size[0]} x {size[1]}")
        return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # bytes in memory: nothing else can fail
        raise ValueError(f"no image: {error}") from None


def decode_array(data: bytes) -> NDArray[np.generic]:
    """An ``.npy`` member as an array.

    Raises:
        ValueError: it is none, or would need pickle, or is not as long as its header says.
    """
    file = io.BytesIO(data)
    try:
        with _PARSING:
            version = np.lib.format.read_magic(file)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError(f"format {version}")
            shape, is_fortran, dtype = read_header[version](file)
        if dtype.hasobject or min(shape, default=0) < 0:
            raise ValueError(f"{shape} {dtype} are no numbers, and allow_pickle is off")
        if len(data) - file.tell() != math.prod(shape) * dtype.itemsize:  # before room is made for it
            raise ValueError(f"{len(data)} bytes for {shape} {dtype}")
        return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if is_fortran else "C").copy()
    except (
        ValueError,
        TypeError,
        tokenize.TokenError,
        RecursionError,
        MemoryError,
    ) as error:  # numpy's own, all of them
        raise ValueError(f"no array: {' '.join(str(error).split())}") from None


def member_bound(*shapes: tuple[int, ...]) -> int:
    """More bytes than any member has of a sample with arrays and images of these shapes, whatever its encoding."""
    return 8 * max(math.prod(shape) for shape in shapes) + _MAX_OTHER_BYTES


def is_finite(array: NDArray[Any]) -> bool:
    """Whether every value is."""
    return bool(np.isfinite(array).all())


def npy(array: NDArray[np.generic]) -> bytes:
    """An array as an ``.npy`` member: C order, no pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()
