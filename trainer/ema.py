"""An exponential moving average of the student's weights.

    ema_0 = theta_0,    ema_n = decay * ema_{n-1} + (1 - decay) * theta_n        after step n, in float32

so ema_n = decay^n theta_0 + (1 - decay) * sum_i decay^(n-i) theta_i: a function of the weights alone. The average is
neither wrapped for other processes nor saved with a counter: equal weights on all processes give equal averages.
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class StudentEma:
    """The average, as a network like the student.

    Args:
        network: the student, float32, before anything wraps it: a copy of wrapped calls would call the original.
        decay: per step, in (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self._average.eval().requires_grad_(False)
        # AveragedModel takes its first update as the start. Ours is the network it was made from, or whatever has been
        # loaded since: then a run that goes on from a checkpoint needs no counter.
        self._average.n_averaged.fill_(1)

    @property
    def module(self) -> nn.Module:
        """The network with the averaged weights: in evaluation mode, without gradients. Buffers are the student's."""
        return self._average.module

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the student's weights; once after each of its steps. Wrapped or not makes no difference."""
        self._average.update_parameters(network)
