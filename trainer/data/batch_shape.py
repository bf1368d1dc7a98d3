"""How the samples of one step are spread over processes and micro-batches.

    batch.dm     = micro_batch       * processes * accumulation
    batch.pairs  = pairs_per_micro   * processes * accumulation

Batches are given for all processes together, so an experiment is the same on eight GPUs as on one; what does not come
out even is refused rather than rounded.
"""

from dataclasses import dataclass

from configs.errors import UserError
from configs.train_schema import TrainConfig


@dataclass(frozen=True)
class BatchShape:
    """The shape of one turn on one process.

    Attributes:
        prompts: samples of distribution matching in a micro-batch; 0 without it.
        pairs: pairs in a micro-batch; 0 without regression.
        accumulation: micro-batches.
    """

    prompts: int
    pairs: int
    accumulation: int

    @property
    def num_images(self) -> int:
        """Samples of a micro-batch, of both kinds."""
        return self.prompts + self.pairs


def batch_shape(config: TrainConfig, world: int) -> BatchShape:
    """Spread a step's samples over ``world`` processes.

    Raises:
        UserError: they do not come out even; names the numbers that would.
    """
    dm = config.batch.dm if config.loss.dm_weight > 0 else 0
    pairs = config.batch.pairs if config.loss.regression_weight > 0 else 0
    name, whole = ("batch.dm", dm) if dm else ("batch.regression", pairs)
    micro = config.runtime.micro_batch or whole // world
    accumulation, rest = divmod(whole, max(micro, 1) * world)
    if rest or not accumulation:
        raise UserError(
            f"{name}: {whole} is not a multiple of runtime.micro_batch {micro} x {world} processes; change one of them"
        )
    if pairs % (accumulation * world):
        raise UserError(
            f"batch.regression: {pairs} pairs cannot be spread evenly over {accumulation} micro-batches x {world} "
            f"processes; give a multiple of {accumulation * world}"
        )
    return BatchShape(micro if dm else 0, pairs // (accumulation * world), accumulation)
