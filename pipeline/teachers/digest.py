"""sha256 of a network by content: every tensor of its safetensors files, and every setting that shapes its output.

    digest = sha256( settings as canonical JSON,
                     then for each component in order of name, for each tensor in order of name:
                         [component, name, dtype, shape] as canonical JSON, the tensor's bytes )

The digest does not depend on where the files lie, on how many files the tensors are spread over, on their order within
a file, or on the precision the network is run in. It does depend on the precision of the *stored* tensors: a file
rounded to float16 is another network. Nothing is assumed about the tensors' meaning, and no network is built: the
files are read front to back in blocks, so memory is bounded whatever the size of the network.

A safetensors file is: 8 bytes little-endian length n, n bytes of JSON ``{name: {dtype, shape, data_offsets}}``,
then the data (https://github.com/huggingface/safetensors#format).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from configs.errors import UserError

BLOCK_BYTES = 16 * 2**20
"""Bytes read at a time."""

VOLATILE = frozenset({"transformers_version", "torch_dtype", "dtype", "name_or_path", "is_local", "local_files_only"})
"""Config entries that say who wrote a file, when and where; so do all entries that start with an underscore."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a safetensors file lies.

    Attributes:
        path: the file.
        dtype: as the file names it: F32, F16, BF16, I64, ...
        shape: its dimensions.
        start: first byte, from the beginning of the file.
        length: in bytes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    def blocks(self) -> Iterator[bytes]:
        """The tensor's bytes, at most BLOCK_BYTES at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.length
            while left:
                block = file.read(min(left, BLOCK_BYTES))
                if not block:
                    raise UserError(f"{self.path}: the file ends before its last tensor; copy or download it again")
                left -= len(block)
                yield block


def weights_digest(weights: Mapping[str, Sequence[Path]], settings: Mapping[str, Any]) -> str:
    """Digest of a network's tensors and settings, 64 hex digits.

    Args:
        weights: the safetensors files of each component; a component may be split over several.
        settings: whatever else shapes the output, as JSON values.

    Raises:
        UserError: a file is not a complete safetensors file, or two files of a component hold the same tensor.
    """
    digest = hashlib.sha256(canonical_json(settings))
    for component in sorted(weights):
        tensors = stored_tensors(weights[component])
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(canonical_json([component, name, tensor.dtype, tensor.shape]))
            for block in tensor.blocks():
                digest.update(block)
    return digest.hexdigest()


def stored_tensors(paths: Sequence[Path]) -> dict[str, StoredTensor]:
    """The tensors of one component by name; only the files' headers are read."""
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in _header(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: tensor {name} is also in {tensors[name].path.name}; remove one of the two files"
                )
            tensors[name] = tensor
    return tensors


def without_volatile(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config without the entries that do not shape its output."""
    return {key: value for key, value in config.items() if not key.startswith("_") and key not in VOLATILE}


def canonical_json(value: object) -> bytes:
    """Equal values give equal bytes: keys sorted, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="np"):
            pass  # the library's own check: lengths, names, dtypes, shapes, and that the data are all there
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error}); copy or download it again") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        tensors[name] = StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start, end - start)
    return tensors
