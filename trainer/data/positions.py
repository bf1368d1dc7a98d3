"""Which positions of the data streams each micro-batch takes.

Pairs and prompts are endless streams (pipeline/shards/order.py, mixture.py). With k turns a step (k = 1 without
distribution matching), A micro-batches a turn on each of W processes, and

    g = m W + rank,   0 <= m < A                       number of a micro-batch among those of its turn, all processes

step s, turn j takes the prompts from (s k + j) batch.dm + g prompts_per_micro_batch, and in turn 0 the pairs from
s batch.pairs + g pairs_per_micro_batch. So two processes take the micro-batches that one takes with twice the
accumulation, and the number of a step is all that it takes to go on from there, with any number of processes.
"""

from dataclasses import dataclass

from configs.train_schema import TrainConfig
from trainer.data.batch_shape import batch_shape


@dataclass(frozen=True)
class Positions:
    """What one micro-batch takes of both streams; empty for a stream that it takes nothing of."""

    step: int
    pairs: range
    prompts: range


class MicroBatchPositions:
    """The micro-batches of one process, numbered in the order in which the loop takes them.

    Args:
        config: the run.
        rank: number of this process.
        world: number of processes.

    Attributes:
        per_step: micro-batches of a step on this process.
    """

    def __init__(self, config: TrainConfig, rank: int, world: int) -> None:
        self._shape = batch_shape(config, world)
        self._rank = rank
        self._world = world
        self._turns = config.loss.critic_steps_per_generator_step if config.loss.dm_weight > 0 else 1
        self.per_step = self._turns * self._shape.accumulation

    def at(self, number: int) -> Positions:
        """The positions of micro-batch ``number``; step s begins with number ``s * per_step``."""
        turn, m = divmod(number, self._shape.accumulation)  # turns are counted through all steps
        step, turn_of_step = divmod(turn, self._turns)
        g = m * self._world + self._rank
        per_turn = self._shape.accumulation * self._world
        prompts = self._shape.prompts * (turn * per_turn + g)
        pairs = self._shape.pairs * (step * per_turn + g)
        return Positions(
            step=step,
            pairs=range(pairs, pairs + self._shape.pairs) if turn_of_step == 0 else range(0),
            prompts=range(prompts, prompts + self._shape.prompts),
        )
