"""A folder that appears whole or not at all, and that can prove it is whole.

It is written under another name (``NAME.tmp``). Then every file is forced to the disk, ``COMPLETE`` is written last, a
list of all files with their lengths and sha256, and only then the folder gets its name, by one rename. So a process
that dies at any moment leaves either nothing, or a ``.tmp`` that nobody reads, or the whole folder; and a folder under
its own name whose ``COMPLETE`` is missing or does not fit was damaged afterwards. (Were ``COMPLETE`` written after the
rename, a folder without it could be either, and a program could not tell a crash from a loss.)

Assumed: a local or network file system whose rename is atomic and whose fsync does what it says. NOT assumed: anything
about the order in which a file system makes unsynced writes durable.
"""

import hashlib
import os
import shutil
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from configs.schema import Model

COMPLETE = "COMPLETE"
TEMPORARY_SUFFIX = ".tmp"
_HASHING_THREADS = 4


class FileSeal(Model):
    """What one file must be."""

    bytes: int
    """Its length."""
    sha256: str
    """Its digest, in hex."""


class Seal(Model):
    """What ``COMPLETE`` says."""

    format_version: Literal[1] = 1
    """Of this record."""
    files: dict[str, FileSeal]
    """Every file of the folder but ``COMPLETE``, by name."""


@contextmanager
def sealed_folder(folder: Path) -> Generator[Path]:
    """Make ``folder`` from the files that the body writes into the yielded one. It must not exist, nor hold folders.

    When the body, or anything else, raises, nothing is left behind, unless the process died: see
    :func:`remove_leftovers`.
    """
    temporary = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        _seal(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def damage(folder: Path) -> str | None:
    """Why a sealed folder is not what was written, in a few words; None if it is, every byte of it.

    Reads everything, and lengths before contents: what is gone is found at once.
    """
    try:
        seal = Seal.model_validate_json((folder / COMPLETE).read_bytes())
    except FileNotFoundError:
        return f"{COMPLETE} is missing"
    except ValidationError:
        return f"{COMPLETE} is not what was written"
    for name, expected in seal.files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != expected.bytes:
            return f"{name} has {size:,} bytes, not {expected.bytes:,}"
    try:
        digests = _digests([folder / name for name in seal.files])
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    return next((f"{name} is not what was written" for name in seal.files if digests[name] != seal.files[name]), None)


def remove(folder: Path) -> None:
    """Remove a sealed folder, so that a process that dies meanwhile leaves a ``.tmp`` and not a damaged folder."""
    temporary = folder.with_name(folder.name + TEMPORARY_SUFFIX)
    folder.rename(temporary)
    shutil.rmtree(temporary)


def remove_leftovers(parent: Path) -> None:
    """Remove what processes that died while writing or removing have left in ``parent``."""
    for leftover in parent.glob(f"*{TEMPORARY_SUFFIX}"):
        shutil.rmtree(leftover)


def _seal(folder: Path) -> None:
    files = sorted(folder.iterdir())
    for file in files:
        _sync(file)
    seal = folder / COMPLETE
    seal.write_text(Seal(files=_digests(files)).model_dump_json(indent=1))
    _sync(seal)
    _sync(folder)


def _digests(files: list[Path]) -> dict[str, FileSeal]:
    def digest(file: Path) -> FileSeal:
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        return FileSeal(bytes=file.stat().st_size, sha256=sha256)

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashlib lets go of the interpreter
        return dict(zip((file.name for file in files), pool.map(digest, files), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
