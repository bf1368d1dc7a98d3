"""What a run learns from: pairs for the regression, prompts for distribution matching.

Opening looks at everything that is cheap to look at, in the main process, before anything large is loaded; worker
processes (trainer/data/loader.py) open the same again for themselves.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from configs.errors import RunStopped
from configs.train_schema import DataIdentity, TrainConfig
from pipeline.shards.pair_decoder import Target
from pipeline.shards.reader import PairBatch
from pipeline.shards.records import Run
from trainer.data.pair_stream import PairStream
from trainer.data.positions import Positions
from trainer.data.prompt_stream import PromptStream

GO_ON = "the same command goes on from the last checkpoint"
"""What to do about an error that is not the run's own."""


@contextmanager
def failing_storage_stops() -> Generator[None]:
    """Turn an error of the storage, OSError, into RunStopped: the same line in the training process as in a worker."""
    try:
        yield
    except OSError as error:
        raise RunStopped(f"data cannot be read ({error}); {GO_ON}") from error


@dataclass(frozen=True)
class MicroBatch:
    """What one network call learns from.

    Attributes:
        prompts: for distribution matching, with fresh noise; empty without it.
        pairs: for the regression; None without it, and in the turns of the fake score.
    """

    prompts: list[str]
    pairs: PairBatch | None


class TrainingData:
    """The data of a run, opened.

    Datasets are opened whenever the config names some: without regression they still give prompts and held-out pairs.

    Attributes:
        config: the run.
        identities: the datasets that are trained on, by content; empty without regression.
        prompts_digest: the prompts of distribution matching by content; None without it.
        target: what the targets of the pairs are; None without pairs.

    Raises:
        UserError: something the config names cannot be used.
        RunStopped: a dataset is damaged, or the storage failed.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        with failing_storage_stops():
            self._pairs = PairStream(config) if config.data.sources else None
            readers = self._pairs.readers if self._pairs else []
            self._prompts = PromptStream(config, readers) if config.loss.dm_weight > 0 else None
        self.target: Target | None = self._pairs.target if self._pairs else None
        self.identities: tuple[DataIdentity, ...] = ()
        if self._pairs is not None and config.loss.regression_weight > 0:
            self.identities = self._pairs.identities()
        self.prompts_digest = self._prompts.digest if self._prompts else None

    @property
    def datasets(self) -> list[tuple[str, Run]]:
        """Root and identity of each dataset."""
        return [(reader.root, reader.run) for reader in self._pairs.readers] if self._pairs else []

    @property
    def num_pairs(self) -> int:
        """Pairs that are trained on, in all datasets together; those held out are not counted."""
        return sum(reader.num_samples for reader in self._pairs.readers) if self._pairs else 0

    @cached_property
    def held_out(self) -> PairBatch | None:
        """The pairs that are never trained on; None if there are none. Read at first use; raises as :meth:`read`."""
        with failing_storage_stops():
            return self._pairs.held_out() if self._pairs else None

    def read(self, positions: Positions) -> MicroBatch:
        """One micro-batch.

        Raises:
            RunStopped: a shard is damaged: names it, and the command that mends it; or the storage failed.
        """
        with failing_storage_stops():
            return MicroBatch(
                prompts=self._prompts.read(positions.prompts) if self._prompts and positions.prompts else [],
                pairs=self._pairs.read(positions.pairs) if self._pairs and positions.pairs else None,
            )

    def cursor(self, step: int) -> dict[str, Any]:
        """How far both streams are before a step. For people and for tools: the step alone is enough to go on."""
        loss, batch = self.config.loss, self.config.batch
        pairs = step * batch.pairs if loss.regression_weight > 0 else 0
        prompts = step * loss.critic_steps_per_generator_step * batch.dm if loss.dm_weight > 0 else 0
        return {
            "step": step,
            "seed": self.config.seed,
            "pairs": {"position": pairs, "datasets": self._pairs.cursor(pairs) if self._pairs else []},
            "prompts": {"position": prompts, "tables": self._prompts.cursor(prompts) if self._prompts else []},
        }
