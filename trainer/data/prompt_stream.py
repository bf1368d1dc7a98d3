"""The stream of prompts for distribution matching: rows of prompt tables in shuffled order.

Either one table that was asked for, or the prompts of the pairs: of each dataset, by its weight, the rows of its table
that its selected samples were made of, those of held-out pairs included (a prompt gives away nothing of the picture).
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import RunStopped, UserError
from configs.train_schema import TrainConfig
from pipeline import teachers
from pipeline.prompts import PromptTable
from pipeline.shards.ahead import Ahead
from pipeline.shards.layout import PROMPTS
from pipeline.shards.mixture import Mixture
from pipeline.shards.order import ShuffledOrder
from pipeline.shards.reader import PairReader
from pipeline.shards.storage import Storage

WINDOW = 8
"""Row groups whose prompts are shuffled together. Twice as many are held in memory, as Arrow arrays."""


class PromptReader:
    """Some rows of one table by position in an endless shuffled stream.

    Args:
        table: the table; belongs to this reader from now on.
        rows: which of its rows, increasing; None: all.
        seed: root of the order.

    Attributes:
        num_prompts: rows of an epoch.
        digest: identity of the prompts.
    """

    def __init__(self, table: PromptTable, rows: "range | NDArray[np.int64] | None", seed: int) -> None:
        self._rows = range(table.num_prompts) if rows is None else rows
        self._group_starts = table.group_starts
        self._first = [bisect_left(self._rows, start) for start in table.group_starts]  # its place among our rows
        self._order = ShuffledOrder(np.diff(self._first).tolist(), seed, WINDOW, f"prompts/{table.digest[:16]}")
        self._groups = Ahead(table.group, 2 * WINDOW, lambda group: None)
        self.num_prompts = len(self._rows)
        self.digest = table.digest
        if self.num_prompts < table.num_prompts:
            chosen = np.asarray(self._rows, "<i8").tobytes()
            self.digest = hashlib.sha256(table.digest.encode() + chosen).hexdigest()

    def read(self, positions: Sequence[int]) -> list[str]:
        """The prompts at some positions, in the order given. Raises OSError if the table cannot be read."""
        prompts: list[str] = []
        for group, place in self._order.locate(positions):
            row = int(self._rows[self._first[group] + place])
            prompts.append(self._groups.get(group)[row - self._group_starts[group]].as_py())
        self._groups.request(self._order.units_from(positions[-1]))
        return prompts


class PromptStream:
    """The prompts of a run.

    Args:
        config: the run.
        datasets: its datasets, if it has any.

    Attributes:
        digest: identity of the prompts, and of their shares.

    Raises:
        UserError: there is no such table, it is not one, or a prompt means nothing to the teacher.
        RunStopped: the table of a dataset is not the one that the dataset was made with.
    """

    def __init__(self, config: TrainConfig, datasets: Sequence[PairReader]) -> None:
        if config.data.prompts is not None:
            table = _table(config.data.prompts)
            teachers.check_prompts(config.teacher, table)
            self._readers = [PromptReader(table, None, config.seed)]
            weights = [1.0]
        else:
            self._readers = [PromptReader(_table_of(dataset), dataset.prompt_rows, config.seed) for dataset in datasets]
            weights = [source.weight for source in config.data.sources]
        self._mixture = Mixture(weights, config.seed, "prompts")
        self.digest = self._readers[0].digest
        if len(self._readers) > 1:
            lines = [f"{reader.digest} {weight!r}" for reader, weight in zip(self._readers, weights, strict=True)]
            self.digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, positions: Sequence[int]) -> list[str]:
        """The prompts at some positions, in the order given. Raises as :meth:`PromptReader.read`."""
        prompts = [""] * len(positions)
        for source, entries in self._mixture.by_source(positions).items():
            found = self._readers[source].read([at for _, at in entries])
            for (place, _), prompt in zip(entries, found, strict=True):
                prompts[place] = prompt
        return prompts

    def cursor(self, position: int) -> list[dict[str, Any]]:
        """Where each table stands at a position of the stream."""
        return [
            {
                "digest": reader.digest,
                "prompts": reader.num_prompts,
                "epoch": taken // reader.num_prompts,
                "position_in_epoch": taken % reader.num_prompts,
            }
            for reader, taken in zip(self._readers, self._mixture.before(position), strict=True)
        ]


def _table(path: str) -> PromptTable:
    """The table that ``data.prompts`` names."""
    try:
        return PromptTable.open(*Storage.of_file(path))
    except UserError as error:
        reason = str(error).rpartition(": ")[2]
        raise UserError(f"data.prompts: {path}: {reason}; make a table with stages/prepare_prompts.py") from None


def _table_of(dataset: PairReader) -> PromptTable:
    table = PromptTable.open(Storage.open(dataset.root), PROMPTS)
    if table.digest != dataset.run.spec.prompts_digest:
        raise RunStopped(f"{dataset.root}/{PROMPTS}: is not the prompt table of this dataset; put the right one back")
    return table
