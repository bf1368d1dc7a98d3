"""A linear layer that autocast leaves alone: for what a network is told of noise level and class.

Autocast narrows inputs and weights of linear layers, and bfloat16 keeps 8 bits of a number: what every block is told of
c_noise and of the class would be wrong by half a percent.

Given float32, with float32 weights, it computes in float32. *Not* assumed: that there is any autocast.
"""

import torch
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """As its base class, under the same names."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, in_features) -> (B, out_features), both float32."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)
