"""A network that learns, with its optimizer: how one of them is updated, and nothing about what it learns.

    for micro_batch in turn:
        with trainable.accumulating(is_last):
            trainable.backward(loss / number of micro-batches)
    trainable.update(step)

Gradients are summed over the micro-batches on each process and averaged over processes with the last one. The counter
of micro-batches is the caller's: a loop whose networks take turns cannot share the one counter of an Accelerator.

The network is prepared (wrapped for its processes, and for autocast), the optimizer is not: with float32 weights and no
gradient scaler a wrapper would do nothing. The learning rate is a function of the step, so there is no scheduler whose
state could be lost, or which could be stepped once per process.
"""

import math
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from configs.train_schema import OptimizerConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


class Trainable:
    """One network, its place among the processes, and its optimizer.

    Args:
        accelerator: prepares the network.
        network: float32, on any device; it is moved. Kept as ``network``, under its own parameter names.
        config: of the optimizer.
        lr: learning rate after warm-up.
        decay_steps: steps at which it has fallen to 0; None: it does not fall.
    """

    def __init__(
        self,
        accelerator: "Accelerator",
        network: nn.Module,
        config: OptimizerConfig,
        lr: float,
        decay_steps: int | None = None,
    ) -> None:
        self.network = network
        self.prepared: nn.Module = accelerator.prepare(network)
        """What to call: gradients of this one are shared among processes, and its calls have the run's precision."""
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._accelerator = accelerator
        self._config = config
        self._lr = lr
        self._decay_steps = decay_steps

    @contextmanager
    def accumulating(self, is_last: bool) -> Generator[None]:
        """Around forward and backward of a micro-batch; the last one of a turn averages gradients over processes."""
        with nullcontext() if is_last else self._accelerator.no_sync(self.prepared):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``.

        Not Accelerator.backward, which divides by what a launcher may have set as its number of micro-batches.
        """
        loss.backward()

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this number, from 0: a linear warm-up, times a half cosine if it falls."""
        rise = min(1.0, (step + 1) / max(self._config.warmup_steps, 1))
        fall = 1.0 if self._decay_steps is None else math.cos(math.pi / 2 * min(1.0, step / self._decay_steps)) ** 2
        return self._lr * rise * fall

    def update(self, step: int) -> tuple[Tensor, bool]:
        """Clip the gradient, make a step of the optimizer, and clear the gradient.

        A gradient that is not finite changes nothing: neither the weights nor the optimizer's moments.

        Args:
            step: number of the student's step, from 0: its learning rate is used.

        Returns:
            The norm of the gradient before clipping, shape (), and whether the update was made. Both are the same on
            all processes.
        """
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self._config.max_grad_norm)
        is_finite = bool(norm.isfinite())
        if is_finite:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, is_finite
