"""Prompt tables: normalised, filtered, de-duplicated prompts with stable ids, in one Parquet file.

A table is a list of prompts p_0 ... p_{n-1}, different ones unless repeated ones were asked for. What identifies it is
its digest,

    digest = sha256( concat_i  id_i TAB p_i LF ),      id_i = first 16 hex digits of sha256(p_i),

so an id depends on the text alone, not on position or filters, and the digest on ids, texts and order, not on how the
file is cut or compressed. A normalised text holds neither TAB nor LF: different tables have different digests.

The file: columns ``prompt_id`` and ``prompt`` (strings, no nulls), row groups of 65,536, zstd, page checksums; the
footer's ``potstill.prompts`` entry is the JSON of :class:`TableInfo`. The same input gives the same bytes with the same
version of pyarrow.
"""

import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path, PurePath
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import PositiveInt, ValidationError

from configs.errors import UserError
from configs.json_text import parse_json
from configs.schema import Model, PromptsConfig
from pipeline.prompt_sources import open_source, read_lines, read_prompts
from pipeline.seen_digests import SeenDigests
from pipeline.shards.row_groups import RowGroups
from pipeline.shards.storage import Storage

TABLE_VERSION = 1
"""Version of the table's layout; a reader refuses a newer one."""

REASONS = ("empty", "too_short", "too_long", "blocklisted", "duplicate")
"""Why a row may be dropped; the first that applies is counted."""

_SCHEMA = pa.schema([pa.field("prompt_id", pa.string(), False), pa.field("prompt", pa.string(), False)])
_INFO_KEY = b"potstill.prompts"
_ROW_GROUP = 65_536
_CHUNK = 16_384
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_WORD = re.compile(r"\w+")


class TableInfo(Model):
    """What a table says about itself in its footer."""

    format_version: int
    """TABLE_VERSION of its writer."""
    digest: str
    """Identity of the prompts, as 64 hex digits."""
    count: PositiveInt
    """Prompts in the table."""
    read: int
    """Rows read from the source; read = count + sum of dropped."""
    dropped: dict[str, int]
    """Rows dropped, by reason."""
    source: str
    """Name of the source file, without its folder."""


@dataclass(frozen=True)
class PromptReport:
    """What :func:`prepare_prompts` did."""

    output: str
    """The table."""
    info: TableInfo
    """Counts and digest."""
    written: bool
    """False: the table was there already, with these very prompts."""

    def __str__(self) -> str:
        """Return a line per count, and the outcome."""
        dropped = [f"  {reason:<12} {number:>12,}" for reason, number in self.info.dropped.items()]
        outcome = "written" if self.written else "is there already with the same prompts: nothing to do"
        return "\n".join(
            [
                f"read           {self.info.read:>12,}",
                f"dropped        {self.info.read - self.info.count:>12,}",
                *dropped,
                f"kept           {self.info.count:>12,}",
                f"digest         {self.info.digest}",
                f"{self.output} {outcome}",
            ]
        )


def normalise(text: str) -> str:
    """Return ``text`` in Unicode NFC, each run of white space and control characters made one space, and stripped.

    Format characters (joiners, direction marks) stay: emoji and many scripts are not legible without them.
    """
    return " ".join(_CONTROL.sub(" ", unicodedata.normalize("NFC", text)).split())


def prepare_prompts(config: PromptsConfig, output: Path | str) -> PromptReport:
    """Make a prompt table of the prompts in ``config.path``, first occurrence and order kept.

    Memory does not grow with the source but for 16 bytes a prompt. With ``config.limit`` reading ends at the last
    prompt kept: rows beyond are neither read nor counted.

    Args:
        config: the source and the filters. A source that is a prompt table is read by its own column.
        output: path or URI that ends in .parquet. If it holds these prompts already it is left alone.

    Raises:
        UserError: the source or the blocklist cannot be read, no prompt is left, or ``output`` holds something else.
    """
    output = str(output)
    if PurePath(output).suffix != ".parquet":
        raise UserError(f"{output}: a prompt table is a .parquet file; name the output so")
    blocked = read_blocklist(config.blocklist) if config.blocklist else None
    column = "prompt" if is_prompt_table(config.path) else config.column
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.parquet"
        return store_table(table, _write_table(table, read_prompts(config.path, column), config, blocked), output)


def store_table(table: Path, info: TableInfo, output: str) -> PromptReport:
    """Put a table that has just been written at ``output``, a path or URI, unless it is there already.

    Raises:
        UserError: ``output`` holds something else.
    """
    storage, name = Storage.of_file(output)
    if storage.exists(name):
        existing = _read_info(RowGroups.open(storage, name, _SCHEMA))
        if existing is None or existing.digest != info.digest:
            raise UserError(f"{output}: exists and does not hold these prompts; remove it or name another output")
        return PromptReport(output, info, written=False)
    storage.upload(name, table)
    return PromptReport(output, info, written=True)


def write_rows(path: Path, prompts: Iterable[str], source: str) -> TableInfo:
    """Write a table of prompts as they are, repeated ones too; ``source`` says for people where they come from."""
    with _TableWriter(path) as writer:
        for prompt in prompts:
            writer.add(_digest(prompt)[:8].hex(), prompt)
        return writer.finish(writer.count, dict.fromkeys(REASONS, 0), source)


def _write_table(
    path: Path, texts: Iterable[str | None], config: PromptsConfig, blocked: Callable[[str], bool] | None
) -> TableInfo:
    dropped: dict[str, int] = dict.fromkeys(REASONS, 0)
    num_read = 0
    seen = SeenDigests()
    with _TableWriter(path) as writer:
        for prompt_id, prompt, reason in _judge(texts, config, blocked, seen):
            num_read += 1
            if reason is not None:
                dropped[reason] += 1
                continue
            writer.add(prompt_id, prompt)
            if writer.count == config.limit:
                break
        if writer.count == 0:
            why = ", ".join(f"{number} {reason}" for reason, number in dropped.items() if number) or "the file is empty"
            raise UserError(f"{config.path}: no prompt is left of {num_read} rows ({why})")
        seen.refuse_collisions()
        return writer.finish(num_read, dropped, PurePath(config.path).name)


class _TableWriter:
    """A table on its way to the disk, a row group at a time."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._ids: list[str] = []
        self._prompts: list[str] = []
        self._sha256 = hashlib.sha256()
        self._file = pq.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=False, write_page_checksum=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, prompt_id: str, prompt: str) -> None:
        self.count += 1
        self._ids.append(prompt_id)
        self._prompts.append(prompt)
        if len(self._ids) == _ROW_GROUP:
            self._flush()

    def finish(self, num_read: int, dropped: dict[str, int], source: str) -> TableInfo:
        if self._ids:
            self._flush()
        counts = {"count": self.count, "read": num_read, "dropped": dropped}
        info = TableInfo(format_version=TABLE_VERSION, digest=self._sha256.hexdigest(), source=source, **counts)
        self._file.add_key_value_metadata({_INFO_KEY: json.dumps(info.model_dump())})
        return info

    def _flush(self) -> None:
        self._sha256.update(_canonical(self._ids, self._prompts))
        self._file.write_table(pa.table([self._ids, self._prompts], schema=_SCHEMA), row_group_size=_ROW_GROUP)
        self._ids, self._prompts = [], []


def _judge(
    texts: Iterable[str | None], config: PromptsConfig, blocked: Callable[[str], bool] | None, seen: "SeenDigests"
) -> Iterator[tuple[str, str, str | None]]:
    """Yield (id, normalised text, reason to drop it or None) for every row."""
    rows = iter(texts)
    while chunk := [normalise(text or "") for text in islice(rows, _CHUNK)]:
        reasons = [_reason(prompt, config, blocked) for prompt in chunk]
        digests = [_digest(prompt) for prompt in chunk]
        passed = [position for position, reason in enumerate(reasons) if reason is None]
        is_new = seen.add([digests[position] for position in passed])
        for position in np.flatnonzero(~is_new & (not config.keep_duplicates)):
            reasons[passed[position]] = "duplicate"
        for digest, prompt, reason in zip(digests, chunk, reasons, strict=True):
            yield digest[:8].hex(), prompt, reason


def _reason(prompt: str, config: PromptsConfig, blocked: Callable[[str], bool] | None) -> str | None:
    if not prompt:
        return "empty"
    if len(prompt) < config.min_chars:
        return "too_short"
    if len(prompt) > config.max_chars:
        return "too_long"
    if blocked is not None and blocked(prompt):
        return "blocklisted"
    return None


def _digest(prompt: str) -> bytes:
    """Return 128 bits of the prompt: the first 64 are its id, all tell it from others."""
    return hashlib.sha256(prompt.encode()).digest()[:16]


def _canonical(ids: Sequence[str], prompts: Sequence[str]) -> bytes:
    return "".join(f"{prompt_id}\t{prompt}\n" for prompt_id, prompt in zip(ids, prompts, strict=True)).encode()


def read_blocklist(path: str) -> Callable[[str], bool]:
    """Read a list of words or phrases, one a line, and return the test whether a normalised prompt has one.

    Words are runs of letters, digits and underscores, compared without regard to case; a phrase is words in a row,
    whatever stands between them: the line ``t-shirt`` finds "T shirt" and not "shirt".

    Raises:
        UserError: the file cannot be read, or a line has no word in it.
    """
    phrases: set[str] = set()
    for number, line in read_lines(open_source(path), path):
        words = _words(normalise(line))
        if not words and line.strip():
            raise UserError(f"{path}:{number}: no word in this line, so it would block nothing; remove it")
        phrases.add(" ".join(words))
    phrases.discard("")
    lengths = {phrase.count(" ") + 1 for phrase in phrases}

    def blocked(prompt: str) -> bool:
        words = _words(prompt)
        return any(" ".join(words[i : i + n]) in phrases for n in lengths for i in range(len(words) - n + 1))

    return blocked


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


# ------------------------------------------------------------------------------------------------------------ reading


def is_prompt_table(path: Path | str) -> bool:
    """Say whether a file, by local path or URI, is a table that :func:`prepare_prompts` made.

    Raises:
        UserError: a .parquet file does not exist or is damaged, or is a table of a newer version.
    """
    if PurePath(path).suffix.lower() != ".parquet":
        return False
    return _read_info(RowGroups.open(*Storage.of_file(str(path)), _SCHEMA)) is not None


class PromptTable:
    """Random access to a prompt table, wherever it lies; holds one row group in memory."""

    def __init__(self, info: TableInfo, file: RowGroups) -> None:
        """Use :meth:`open`; this only keeps the parts."""
        self.num_prompts = info.count
        """Number of prompts."""
        self.digest = info.digest
        """Identity of the prompts, as the table's footer states it."""
        self.group_starts = file.starts
        """First row of each row group, and the number of prompts at the end."""
        self._file = file

    @classmethod
    def open(cls, storage: Storage, path: str) -> Self:
        """Open the table ``path`` of a storage. Raises UserError if there is none or it is not a prompt table."""
        file = RowGroups.open(storage, path, _SCHEMA)
        info = _read_info(file)
        if info is None:
            raise UserError(f"{file.where}: not a prompt table; make one with stages/prepare_prompts.py")
        return cls(info, file)

    def rows(self, start: int, stop: int) -> tuple[list[str], list[str]]:
        """Return (ids, prompts) of the rows ``start <= row < stop``; IndexError unless 0 <= start <= stop <= n."""
        ids: list[str] = []
        prompts: list[str] = []
        for part in self._file.rows(start, stop):
            ids += part["prompt_id"].to_pylist()
            prompts += part["prompt"].to_pylist()
        return ids, prompts

    def ids(self, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The ids of some rows, which never decrease, as numbers: equal where the prompts are.

        Made from the prompts, as a table's digest is; reads only the row groups that hold one of the rows.
        """
        parts = [np.zeros(0, np.uint64)]
        bounds = np.searchsorted(rows, self.group_starts).tolist()
        for number, (first, last) in enumerate(pairwise(bounds)):
            if first < last:
                prompts = self.group(number).take(pa.array(rows[first:last] - self.group_starts[number])).to_pylist()
                parts.append(np.frombuffer(b"".join(_digest(prompt)[:8] for prompt in prompts), np.dtype(">u8")))
        return np.concatenate(parts, dtype=np.uint64)

    def group(self, number: int) -> pa.ChunkedArray:
        """The prompts of one row group; compact, where a list of strings takes several times as much."""
        return self._file.group(number)["prompt"]

    def distinct(self) -> Iterator[str]:
        """The different prompts of each row group."""
        for group in range(len(self.group_starts) - 1):
            yield from self.group(group).unique().to_pylist()

    def verify(self) -> None:
        """Read the whole table; raise UserError unless ids, order and texts are those that the digest was made of."""
        digest = hashlib.sha256()
        for start, stop in pairwise(self.group_starts):
            ids, prompts = self.rows(start, stop)
            for prompt_id, prompt in zip(ids, prompts, strict=True):
                if prompt_id != _digest(prompt)[:8].hex():
                    raise UserError(
                        f"{self._file.where}: {prompt_id} is not the id of its prompt; make the table again"
                    )
            digest.update(_canonical(ids, prompts))
        if digest.hexdigest() != self.digest:
            raise UserError(f"{self._file.where}: the prompts are not those of its digest; make the table again")


def _read_info(file: RowGroups) -> TableInfo | None:
    """Return what a Parquet file's footer says, or None if it is not a prompt table; UserError if it cannot be so."""
    entry = file.entry(_INFO_KEY)
    if entry is None:
        return None
    try:
        version = parse_json(entry)["format_version"]
        if version > TABLE_VERSION:
            raise UserError(f"{file.where}: made by a newer version (format {version}); update")
        info = TableInfo.model_validate_json(entry)
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(f"{file.where}: its footer is damaged; make the table again") from None
    if info.count != file.num_rows or not file.has_its_columns:
        raise UserError(f"{file.where}: its rows or columns are not those of its footer; make the table again")
    return info
