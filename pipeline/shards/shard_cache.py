"""Verified tars on this machine: local ones where they lie, remote ones in a folder of limited size.

Contract of :meth:`ShardCache.open`: every byte of the file it returns has been hashed by this process since the file
was last written, and the sha256 is the one of the commit record. tar has no checksum over data, so this is where
damage is found.

A folder of the cache serves any number of processes and datasets: a shard's name holds fingerprint and sha256. A shard
appears in it whole and verified, or not at all. One process at a time downloads into a folder, under a lock that the
system lets go when its holder dies; the others wait and then find the file. Over the limit, the shards opened longest
ago go first; whoever has one open keeps reading it (its bytes are given back when it is closed).
"""

import fcntl
import hashlib
import io
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import RunStopped, UserError
from pipeline.shards.local_write import STAGING_PREFIX
from pipeline.shards.records import Commit
from pipeline.shards.storage import Storage
from pipeline.shards.writer import DamagedShard

_LOCK = ".lock"
_PART_SUFFIX = ".part"


class ShardCache:
    """The tars of one dataset as local files.

    Args:
        storage: root of the dataset. The shards of a local one are read in place.
        folder: where shards of a remote dataset are kept; made if it is needed.
        max_bytes: its largest size. One shard may be larger.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, storage: Storage, folder: Path, max_bytes: int) -> None:
        self._storage = storage
        self._root = Path(storage.uri) if storage.uri.startswith("/") else None
        self._folder = folder
        self._max_bytes = max_bytes
        self._verified: dict[str, tuple[int, int, int]] = {}
        if self._root is None:
            self._open_lock().close()

    def open(self, commit: Commit) -> io.FileIO:
        """Open a shard, for ``os.pread``.

        Raises:
            DamagedShard: it is missing, or not the one that was committed.
            RunStopped: the disk of the cache is full.
            OSError: the storage failed.
        """
        try:
            return self._verify(commit, self._path(commit))
        except FileNotFoundError:
            if self._root is not None:
                raise _missing(commit) from None
        except DamagedShard:
            if self._root is not None:
                raise
            self._path(commit).unlink(missing_ok=True)  # the copy is damaged, which says nothing about the original
        self._download(commit)
        return self._verify(commit, self._path(commit))

    def _path(self, commit: Commit) -> Path:
        return self._root / commit.path if self._root is not None else self._folder / Path(commit.path).name

    def _verify(self, commit: Commit, path: Path) -> io.FileIO:
        """Open a local file. Raises DamagedShard unless it is the committed one, FileNotFoundError if it is gone."""
        file = io.FileIO(path)
        try:
            status = os.fstat(file.fileno())
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._verified.get(commit.path) != state:
                if hashlib.file_digest(file, "sha256").hexdigest() != commit.sha256:
                    short = f"{status.st_size:,} bytes of {commit.num_bytes:,}; "
                    raise DamagedShard(
                        f"shard {commit.shard}: {commit.path} is damaged: "
                        f"{short if status.st_size != commit.num_bytes else ''}its sha256 is not the one recorded"
                    )
                self._verified[commit.path] = state
            if self._root is None:
                with suppress(FileNotFoundError):  # another process has just evicted it
                    os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))
        except BaseException:
            file.close()
            raise
        return file

    def _download(self, commit: Commit) -> None:
        """Put a shard into the folder, unless somebody has done so meanwhile."""
        target = self._path(commit)
        part = target.with_name(target.name + _PART_SUFFIX)
        with self._locked():
            if target.exists():
                return
            for left in (*self._folder.glob(STAGING_PREFIX + "*"), *self._folder.glob("*" + _PART_SUFFIX)):
                left.unlink()  # of a process that was killed: no other than this one is downloading
            try:
                self._storage.download(commit.path, part)
            except FileNotFoundError:
                raise _missing(commit) from None
            except OSError as error:
                if (free := _free_bytes(self._folder)) < commit.num_bytes:
                    raise RunStopped(
                        f"{self._folder}: no room for a shard of {commit.num_bytes:,} bytes, {free:,} are free; "
                        "set runtime.cache_dir to a larger disk, or lower runtime.cache_gb"
                    ) from error
                raise
            try:
                self._verify(commit, part).close()
            except DamagedShard:
                part.unlink()
                raise
            part.replace(target)
            self._evict(target)

    def _evict(self, newest: Path) -> None:
        """Delete the shards opened longest ago until the rest, with ``newest``, is within the limit."""
        shards = sorted((path.stat().st_atime_ns, path.stat().st_size, path) for path in self._folder.glob("*.tar"))
        excess = sum(size for _, size, _ in shards) - self._max_bytes
        for _, size, path in shards:
            if excess > 0 and path != newest:
                path.unlink()
                excess -= size

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        with self._open_lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go with the file
            yield

    def _open_lock(self) -> io.FileIO:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            return io.FileIO(self._folder / _LOCK, "w")
        except OSError as error:
            raise UserError(
                f"runtime.cache_dir: {self._folder} cannot be written to ({error.strerror}); name another folder"
            ) from None


def _missing(commit: Commit) -> DamagedShard:
    return DamagedShard(f"shard {commit.shard}: {commit.path} is missing")


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
