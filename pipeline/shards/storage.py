"""Objects in a folder, a bucket, or a prefix of one: the only door from datasets to disk and network.

Contract, the same for local folders and for ``s3://``, ``gs://`` and ``az://`` (through obstore):

* An object appears whole or not at all; nobody ever reads a partial one.
* :meth:`Storage.create` is create-only: of many racing callers, in any number of processes, at most one gets ``True``,
  and the object is that caller's. (Exactly one, unless a network loses the reply to a write that succeeded: then the
  repeated request finds its own object, and even the winner is told ``False``. Read the object to learn who won.)
* When a write returns, the object survives power loss. Cloud stores promise that. obstore's local store does not (it
  never calls fsync), so local writes are ours: :mod:`pipeline.shards.local_write`.
* Server errors, dropped connections and throttling are retried with exponential backoff, for two minutes at most. A
  listing that breaks off goes on after the last name: buckets list in order of their names (S3 Express does not).

NOT assumed: an order of local listings, modification times that agree between hosts, a rename, appending, empty
folders.
A local folder needs a file system with hard links (every POSIX one, NFS included). Symbolic links are followed, also
when they lead out of the folder. Credentials and endpoints come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``, ``GOOGLE_SERVICE_ACCOUNT``, ``AZURE_STORAGE_ACCOUNT_NAME``, ...) or from the
machine's own role, and no message contains them.

obstore works in threads, which do not survive a fork: a child forked after the first access would hang. It gets a
RuntimeError instead. Start workers by spawn or forkserver.
"""

import errno
import io
import os
import re
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Self
from urllib.parse import unquote

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from configs.errors import UserError
from pipeline.shards.local_write import BUFFER_BYTES, STAGING_PREFIX, put_local

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_UNUSABLE = re.compile(r"[\x00-\x1f\x7f]|#\d+$")  # obstore keeps names in #1, #2, ... for itself
_MAX_BROKEN_LISTINGS = 5
_LISTING_PAUSE_S = 0.05
_PART_BYTES = 8 << 20  # S3 allows 10,000 parts: objects up to 80 GB
_RETRY: "RetryConfig" = {"max_retries": 8, "retry_timeout": timedelta(minutes=2)}
_CLIENT: "ClientConfig" = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "10m"}
# The first access answers "are endpoint, bucket and credentials right?", and a person waits for it. Without a short
# leash a machine that has no credentials asks an absent metadata service for a minute and more.
_FIRST_RETRY: "RetryConfig" = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_FIRST_CLIENT: "ClientConfig" = {"connect_timeout": "3s", "timeout": "10s"}
_CREDENTIALS_SERVICE = re.compile(r"/latest/(api/token|meta-data)|computeMetadata|/metadata/identity")
_DENIED = re.compile(r"status code: 40[13]\b")  # a listing that is denied raises no PermissionDeniedError
_CREDENTIALS_HINT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a listing."""

    path: str
    """Path relative to the storage's root, with forward slashes."""
    size: int
    """Bytes."""
    modified: datetime
    """Time of the last write, by the clock of the store."""


class Storage:
    """The objects under one root. Paths are relative, with forward slashes, without ``.`` and ``..``."""

    def __init__(self, uri: str, store: "ObjectStore", prefix: str, local_root: Path | None) -> None:
        """Use :meth:`open`; this only keeps the parts."""
        self.uri = uri
        """The root: an absolute local path, or scheme://bucket/prefix without a slash at the end."""
        self._store = store
        self._prefix = prefix
        self._local_root = local_root

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open the root ``uri``: an absolute path, ``file://``, ``s3://``, ``gs://`` or ``az://``. Creates nothing.

        A remote root is looked at once, so that a wrong endpoint, bucket or credential is found here.

        Raises:
            UserError: the root is relative, of an unknown scheme, a file or below one, out of reach, or access to it is
                denied.
        """
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme == "file":
            return cls._open_local(unquote(rest) if separator else uri, uri)
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket:
            raise UserError(f"{scheme}://...@...: credentials do not belong in an address; put them in the environment")
        if scheme not in _CREDENTIALS_HINT or not bucket:
            raise UserError(
                f"{uri}: not an absolute path, file://, s3://bucket/..., gs://bucket/... or az://container/..."
            )
        prefix = prefix.strip("/")
        root = f"{scheme}://{bucket}/{prefix}".rstrip("/")
        try:
            with _translated(root):
                first = _remote_store(scheme, bucket, _FIRST_CLIENT, _FIRST_RETRY)
                store = _remote_store(scheme, bucket, _CLIENT, _RETRY)
            cls(root, first, prefix, None).is_empty()
        except OSError as error:
            raise UserError(f"{root}: out of reach ({error.strerror}); check bucket, endpoint and network") from None
        return cls(root, store, prefix, None)

    @classmethod
    def _open_local(cls, path: str, uri: str) -> Self:
        if not path.startswith("/"):
            raise UserError(f"{uri}: not an absolute path; a worker's or a job's working directory is another one")
        root = Path(os.path.normpath(path))
        nearest = next(folder for folder in (root, *root.parents) if folder.exists())
        if not nearest.is_dir():
            raise UserError(f"{nearest}: is a file, not a folder")
        return cls(str(root), LocalStore(), str(root).strip("/"), root)

    @classmethod
    def of_file(cls, path: str) -> tuple[Self, str]:
        """Open the folder of one file, given by a URI or by a local path (relative to the working directory).

        Returns:
            The storage of its folder, and its name there.
        """
        absolute = path if "://" in path else str(Path(path).absolute())
        folder, _, name = absolute.rpartition("/")
        if not name or folder.endswith(":/"):
            raise UserError(f"{path}: not the name of a file")
        return cls.open(folder or "/"), name

    def __repr__(self) -> str:
        """Return the root's address, which holds no credentials."""
        return f"Storage({self.uri})"

    # ------------------------------------------------------------------------------------------------------ reading

    def read(self, path: str) -> bytes:
        """Return the whole object. Raises FileNotFoundError."""
        with _translated(self.uri, path):
            return bytes(obstore.get(self._store, self._key(path)).bytes())

    def read_range(self, path: str, start: int, length: int) -> bytes:
        """Return ``length`` bytes from byte ``start``. Raises FileNotFoundError, and OSError beyond the end."""
        with _translated(self.uri, path):
            data = bytes(obstore.get_range(self._store, self._key(path), start=start, length=length))
        if len(data) != length:
            raise OSError(errno.EIO, f"{self.uri}/{path}: no {length} bytes from byte {start}")
        return data

    def reader(self, path: str) -> BinaryIO:
        """Return a seekable file object that fetches 1 MiB at a time, or what is asked for if that is more."""
        return io.BufferedReader(_RangeReader(self, path), BUFFER_BYTES)

    def download(self, path: str, local: Path) -> None:
        """Write the object to ``local``, which appears whole or not at all. Raises FileNotFoundError."""
        staging = local.with_name(STAGING_PREFIX + secrets.token_hex(8))
        try:
            with _translated(self.uri, path), staging.open("xb") as file:
                for chunk in obstore.get(self._store, self._key(path)).stream(min_chunk_size=BUFFER_BYTES):
                    file.write(chunk)
            staging.replace(local)
        finally:
            staging.unlink(missing_ok=True)

    def size(self, path: str) -> int:
        """Return the object's length in bytes. Raises FileNotFoundError."""
        with _translated(self.uri, path):
            return obstore.head(self._store, self._key(path))["size"]

    def exists(self, path: str) -> bool:
        """Say whether there is an object of this name (a folder is none)."""
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects under the folder ``prefix``, in no particular order, a thousand at a time."""
        return (info for info in self._walk(prefix) if not _is_staging(info))

    def leftovers(self) -> Iterator[ObjectInfo]:
        """Yield staging files: local writes in progress, and those of writers that died. They are never listed.

        Unfinished uploads to a bucket are invisible here; a lifecycle rule of the bucket removes them.
        """
        return (info for info in self._walk("") if _is_staging(info))

    def is_empty(self) -> bool:
        """Say whether there is no object at all. A folder that does not exist is empty."""
        return next(self.list(), None) is None

    # ------------------------------------------------------------------------------------------------------ writing

    def write(self, path: str, data: bytes) -> None:
        """Write an object, atomically replacing any of this name."""
        self._put(path, data, create=False)

    def upload(self, path: str, local: Path) -> None:
        """Write the content of the file ``local``, of any length, atomically replacing any object of this name."""
        local.stat()  # a missing source is named as such, not as a missing object
        self._put(path, local, create=False)

    def create(self, path: str, data: bytes) -> bool:
        """Write an object if there is none of this name, and say whether this call did (see the module's contract)."""
        return self._put(path, data, create=True)

    def delete(self, path: str) -> None:
        """Remove an object; one that does not exist is fine. A local folder stays when it becomes empty."""
        with suppress(FileNotFoundError), _translated(self.uri, path):
            obstore.delete(self._store, self._key(path))

    # ------------------------------------------------------------------------------------------------------ private

    def _key(self, path: str) -> str:
        """Return the name the store knows ``path`` by; ValueError on one that some store could not hold."""
        if any(part in ("", ".", "..") for part in path.split("/")) or _UNUSABLE.search(path):
            raise ValueError(f"not an object path: {path!r}")
        return f"{self._prefix}/{path}" if self._prefix else path

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        folder = self._key(prefix.strip("/")) if prefix.strip("/") else self._prefix
        skip = len(self._prefix) + 1 if self._prefix else 0
        last: str | None = None
        for attempt in count(1):
            try:
                with _translated(self.uri, prefix):
                    for chunk in obstore.list(self._store, folder or None, offset=last, chunk_size=1000):
                        for meta in chunk:
                            yield ObjectInfo(meta["path"][skip:], meta["size"], meta["last_modified"])
                            last = meta["path"]
                return
            except OSError as error:  # obstore takes up a broken download itself, but not a broken listing
                if attempt > _MAX_BROKEN_LISTINGS or "list response body" not in str(error):
                    raise
                time.sleep(_LISTING_PAUSE_S * 2**attempt)

    def _put(self, path: str, source: bytes | Path, *, create: bool) -> bool:
        key = self._key(path)
        with _translated(self.uri, path):
            if self._local_root is not None:
                return put_local(self._local_root / path, source, create=create)
            try:
                obstore.put(self._store, key, source, mode="create" if create else "overwrite", chunk_size=_PART_BYTES)
            except AlreadyExistsError:
                return False
            return True


class _RangeReader(io.RawIOBase):
    """Random access to one object, a request per read: to be wrapped in a BufferedReader."""

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._size = storage.size(path)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, f"negative position {origin + offset}")  # as a file on a disk does
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        view = memoryview(buffer)
        length = min(len(view), self._size - self._position)
        if length <= 0:
            return 0
        view[:length] = self._storage.read_range(self._path, self._position, length)
        self._position += length
        return length


def _is_staging(info: ObjectInfo) -> bool:
    return info.path.rpartition("/")[2].startswith(STAGING_PREFIX)


def _remote_store(scheme: str, bucket: str, client: "ClientConfig", retry: "RetryConfig") -> "ObjectStore":
    # Client options given here replace those obstore takes from the environment, and this one is part of the contract.
    client = {**client, "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")}
    if scheme == "s3":
        return S3Store(bucket, client_options=client, retry_config=retry)
    if scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=retry)
    return AzureStore(bucket, client_options=client, retry_config=retry)


# ------------------------------------------------------------------------------------------------------------ errors


_used_in: int | None = None  # the process whose threads obstore runs on


def _refuse_fork() -> None:
    global _used_in
    _used_in = _used_in or os.getpid()
    if _used_in != os.getpid():
        raise RuntimeError("storage was used before this process was forked; start workers by spawn instead of fork")


@contextmanager
def _translated(uri: str, path: str = "") -> Generator[None, None, None]:
    """Turn errors of obstore and of the system into few kinds, each with one line that names the object."""
    _refuse_fork()
    try:
        yield
    except (BaseError, OSError) as error:
        # Never chained: obstore's messages quote whole replies, and those can quote credentials.
        _raise(error, f"{uri}/{path}" if path else uri)


def _raise(error: Exception, where: str) -> NoReturn:
    text = str(error)
    system = re.search(r"\(os error (\d+)\)", text)
    code = int(system[1]) if system else error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where) from None
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        raise UserError(f"{where}: {os.strerror(code)}; choose another place or change its permissions") from None
    if code is not None:
        raise OSError(code, os.strerror(code), where) from None
    if isinstance(error, InvalidPathError):  # _key() lets none through: it is of a file that was met in a listing
        path = re.search(r'Path "(.*?)"', text, re.DOTALL)
        # All of the path: a folder's name may be the odd one.
        name = repr("/" + path[1].removeprefix("/")) if path else "a file"
        raise UserError(f"{where}: no store could hold {name}, which lies there; rename it") from None
    scheme = where.partition("://")[0]
    if _CREDENTIALS_SERVICE.search(text):
        hint = _CREDENTIALS_HINT.get(scheme, "credentials")
        raise UserError(f"{where}: no credentials found; set {hint} in the environment") from None
    if isinstance(error, (PermissionDeniedError, UnauthenticatedError)) or _DENIED.search(text):
        raise UserError(f"{where}: access denied ({_reason(text)}); check the credentials and their rights") from None
    raise OSError(errno.EIO, _reason(text), where) from None


def _reason(text: str) -> str:
    """Return the first line of a message without reply, query strings (they hold signatures) and logins."""
    line = re.sub(r"\?\S*|(?<=://)[^/\s]*@", "", text.partition("\n")[0].partition("<")[0]).strip(" :")
    code = re.search(r"<Code>(\w+)</Code>", text)
    return f"{line}: {code[1]}" if code else line
