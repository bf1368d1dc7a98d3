"""Selection files: which samples of one dataset are meant, as sorted keys in one Parquet file.

Column ``key``: nine-digit strings, strictly increasing, no nulls. The footer's ``potstill.selection`` entry is the JSON
of :class:`SelectionInfo`. What identifies a selection is its digest,

    digest = sha256( key_0 LF key_1 LF ... key_{n-1} )

so it depends on the samples alone, not on how they were found or how the file is compressed. In memory a key is its
sample id, an int64: ten million take 80 MB.
"""

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import ValidationError

from configs.errors import UserError
from configs.json_text import parse_json
from configs.schema import Model
from pipeline.shards.parquet_fault import reading_parquet
from pipeline.shards.storage import Storage

SELECTION_VERSION = 1
"""Version of the file's layout; a reader refuses any other."""

_INFO_KEY = b"potstill.selection"
_SCHEMA = pa.schema([pa.field("key", pa.string(), False)])
_DIGITS = 9
_ROWS = 1 << 20
"""Keys of a row group, and of one pass of the arithmetic below."""


class SelectionInfo(Model):
    """What a selection says about itself in its footer."""

    format_version: int
    """SELECTION_VERSION of its writer."""
    fingerprint: str
    """Fingerprint of the dataset that it selects from."""
    digest: str
    """Identity of the selected keys, as 64 hex digits."""
    count: int
    """Number of keys."""
    query: str
    """How they were found, for people."""


@dataclass(frozen=True)
class Selection:
    """Some samples of a dataset.

    Attributes:
        sample_ids: int64, strictly increasing, not empty.
        digest: identity of the selection.
    """

    sample_ids: NDArray[np.int64]
    digest: str


def write_selection(path: str, sample_ids: NDArray[np.int64], *, fingerprint: str, query: str) -> SelectionInfo:
    """Write a selection, replacing any file of this name.

    Args:
        path: local path or URI.
        sample_ids: strictly increasing, 0 <= id < 10**9.
        fingerprint: of the dataset.
        query: how the samples were found, for people.
    """
    if len(sample_ids) and not (0 <= sample_ids[0] and sample_ids[-1] < 10**_DIGITS and _increases(sample_ids)):
        raise ValueError("sample ids must be strictly increasing, at least 0 and of at most nine digits")
    info = SelectionInfo(
        format_version=SELECTION_VERSION,
        fingerprint=fingerprint,
        digest=_digest(sample_ids),
        count=len(sample_ids),
        query=query,
    )
    storage, name = Storage.of_file(path)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "selection.parquet"
        with pq.ParquetWriter(local, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for start in range(0, len(sample_ids), _ROWS):
                keys = pa.array(_key_matrix(sample_ids[start : start + _ROWS]).view(f"S{_DIGITS}").ravel())
                writer.write_table(pa.table([keys.cast(pa.string())], schema=_SCHEMA))
            writer.add_key_value_metadata({_INFO_KEY.decode(): info.model_dump_json()})
        storage.upload(name, local)
    return info


def read_selection(path: str, fingerprint: str) -> Selection:
    """Read a selection of the dataset with this fingerprint.

    Raises:
        UserError: there is none, or it is damaged, empty, or of another dataset.
    """
    storage, name = Storage.of_file(path)
    try:
        with reading_parquet():
            file = pq.ParquetFile(storage.reader(name))
            info = _info(path, file)
            parts = [batch.column("key").cast(pa.int64()) for batch in file.iter_batches(_ROWS, columns=["key"])]
            sample_ids = np.concatenate([np.zeros(0, np.int64), *(part.to_numpy() for part in parts)])
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a selection, or leave data.selection out") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a selection, or a damaged one ({error})") from None
    if info.fingerprint != fingerprint:
        raise UserError(
            f"{path}: selects from dataset {info.fingerprint[:12]}, and this is {fingerprint[:12]}; "
            "name a selection of this dataset"
        )
    if len(sample_ids) == 0:
        raise UserError(f"{path}: selects no sample; make one that does, or leave it out")
    if not _increases(sample_ids) or len(sample_ids) != info.count or _digest(sample_ids) != info.digest:
        raise UserError(f"{path}: its keys are not those of its digest, or not in order; make it again")
    return Selection(sample_ids, info.digest)


def _info(path: str, file: pq.ParquetFile) -> SelectionInfo:
    """What the footer says; UserError if it is none of a selection, or of another version."""
    entry = (file.metadata.metadata or {}).get(_INFO_KEY)
    if entry is None:
        raise UserError(f"{path}: not a selection: its footer has no {_INFO_KEY.decode()}; name a selection")
    try:
        version = parse_json(entry)["format_version"]
        if version != SELECTION_VERSION:
            raise UserError(
                f"{path}: is a selection of format {version!r}, this code knows {SELECTION_VERSION} only; "
                "use the version of the code that made it"
            )
        return SelectionInfo.model_validate_json(entry)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(f"{path}: its footer is damaged; make the selection again") from None


def _increases(sample_ids: NDArray[np.int64]) -> bool:
    return bool((np.diff(sample_ids) > 0).all())


def _digest(sample_ids: NDArray[np.int64]) -> str:
    """Sha256 over the keys joined by line feeds."""
    digest = hashlib.sha256()
    for start in range(0, len(sample_ids), _ROWS):
        keys = _key_matrix(sample_ids[start : start + _ROWS])
        lines = np.pad(keys, ((0, 0), (1, 0)), constant_values=ord("\n"))
        digest.update(lines.tobytes()[0 if start else 1 :])
    return digest.hexdigest()


def _key_matrix(sample_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
    """(n, 9) ASCII digits."""
    powers = 10 ** np.arange(_DIGITS - 1, -1, -1, dtype=np.int64)
    return (sample_ids[:, None] // powers % 10 + ord("0")).astype(np.uint8)
