"""A dataset's prompt table as a local copy, for many threads.

A copy, so that what cannot be read of it is damage and an error of the storage is none, and so that a row group is not
fetched for every shard. A :class:`pipeline.prompts.PromptTable` is for one thread: each gets a reader of its own.
"""

import threading
from pathlib import Path

from configs.errors import UserError
from pipeline.prompts import PromptTable
from pipeline.shards.dataset import Dataset
from pipeline.shards.layout import PROMPTS
from pipeline.shards.storage import Storage


class LocalPrompts:
    """The prompt table of a dataset.

    Args:
        dataset: the dataset.
        folder: where to put the copy.

    Raises:
        FileNotFoundError: the dataset has no prompt table.
        OSError: the storage failed.
    """

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        dataset.storage.download(PROMPTS, folder / PROMPTS)
        self._storage = Storage.open(str(folder))
        self._expected_digest = dataset.run.spec.prompts_digest
        self._thread = threading.local()

    def problem(self) -> str | None:
        """Read it all; why it is not the table that the dataset was made with, or None."""
        try:
            table = PromptTable.open(self._storage, PROMPTS)
            table.verify()
        except (UserError, OSError) as error:
            return str(error).replace(f"{self._storage.uri}/", "")
        if table.digest != self._expected_digest:
            return f"{PROMPTS}: is not the prompt table of this dataset"
        return None

    def rows(self, start: int, stop: int) -> tuple[list[str], list[str]]:
        """(ids, prompts) of the rows ``start <= row < stop``."""
        if not hasattr(self._thread, "table"):
            self._thread.table = PromptTable.open(self._storage, PROMPTS)
        return self._thread.table.rows(start, stop)
