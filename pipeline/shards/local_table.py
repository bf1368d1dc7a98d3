"""The table that a dataset's samples refer to, as a local copy for many threads.

A copy, so that what cannot be read of it is damage and an error of the storage is none, and so that a row group is not
fetched for every shard. A table is for one thread: each gets a reader of its own.
"""

import threading
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from configs.errors import UserError
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage


class Table(Protocol):
    """A prompt table, or a list of images."""

    digest: str

    @classmethod
    def open(cls, storage: Storage, path: str) -> Self:
        """Open the table ``path`` of a storage. Raises UserError if there is none or it is something else."""
        ...

    def verify(self) -> None:
        """Raise UserError unless its rows are those that its digest was made of."""
        ...


AnyTable = TypeVar("AnyTable", bound=Table)


class LocalTable(Generic[AnyTable]):
    """The table of a dataset.

    Args:
        dataset: the dataset.
        name: path of the table below the root.
        kind: the class that reads it.
        digest: what the dataset was made with.
        folder: where to put the copy.

    Raises:
        FileNotFoundError: the dataset has no such table.
        OSError: the storage failed.
    """

    def __init__(self, dataset: Dataset, name: str, kind: type[AnyTable], digest: str, folder: Path) -> None:
        dataset.storage.download(name, folder / name)
        self._storage = Storage.open(str(folder))
        self._name = name
        self._kind = kind
        self._digest = digest
        self._thread = threading.local()

    def problem(self) -> str | None:
        """Read it all; why it is not the table that the dataset was made with, or None."""
        try:
            table = self._kind.open(self._storage, self._name)
            table.verify()
        except (UserError, OSError) as error:
            return str(error).replace(f"{self._storage.uri}/", "")
        if table.digest != self._digest:
            return f"{self._name}: is not the table of this dataset"
        return None

    @property
    def reader(self) -> AnyTable:
        """The calling thread's own."""
        if not hasattr(self._thread, "table"):
            self._thread.table = self._kind.open(self._storage, self._name)
        return self._thread.table
