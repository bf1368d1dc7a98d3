"""A network made into a denoiser: (x_t, t, condition) -> x0, the expected clean sample.

    D(x_t, t, c) = to_x0(network(x_t, t, c)) = E[x0 | x_t, c]

Two networks that were trained with different predictions, on different schedules, in different precisions, look the
same once they are denoisers. Samplers, guidance and losses see nothing else.

Low precision is a property of the network call, never of the formula. For Stable Diffusion at its last timestep
eps -> x0 multiplies every rounding error of eps by sigma / alpha = 14.6, so rounding happens once, in the network,
and not again in the arithmetic around it. :meth:`Denoiser.predict` is the only place where a tensor changes precision.

*Not* assumed: that the network is a torch module, on which device it lives, or what its condition means.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.parametrization import Parametrization, to_x0
from pipeline.diffusion.schedules import NoiseSchedule

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t, t, condition) -> prediction: shapes (B, *), () or (B,), (B, ...) -> (B, *)."""


@dataclass(frozen=True)
class Denoiser:
    """A network, together with what is needed to read its predictions.

    Args:
        network: (x_t, t, condition) -> prediction.
        schedule: the noise levels that t stands for.
        parametrization: what the network predicts.
        network_dtype: the precision in which the network takes x_t and condition.
    """

    network: Network
    schedule: NoiseSchedule
    parametrization: Parametrization
    network_dtype: torch.dtype = torch.float32

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the network's raw prediction in float32.

        Args:
            x_t: noisy sample, shape (B, *), float32.
            t: time, shape () or (B,), as the schedule takes it.
            condition: shape (B, ...), floating point.

        Returns:
            The prediction, shape (B, *), float32.
        """
        # t keeps its dtype: bfloat16 has 8 bits of mantissa and would turn timestep 999 into 1000.
        return self.network(x_t.to(self.network_dtype), t, condition.to(self.network_dtype)).float()

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the expected clean sample.

        Args:
            x_t: noisy sample, shape (B, *), float32.
            t: time, shape () or (B,), as the schedule takes it.
            condition: shape (B, ...), floating point.

        Returns:
            x0, shape (B, *), float32.
        """
        alpha, sigma = self.schedule(t)
        return to_x0(self.predict(x_t, t, condition), x_t, alpha, sigma, self.parametrization)
