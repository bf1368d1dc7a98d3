"""The preconditioning of EDM around a network F: the one place where a noise level becomes numbers.

    D(x, sigma, c) = c_skip x + c_out F(c_in x, c_noise, c)                                             (EDM Eq. 7)

    c_skip  = sigma_data^2 / (sigma^2 + sigma_data^2)       c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
    c_out   = sigma sigma_data c_in                         c_noise = noise_scale log(sigma) / 4        (EDM Table 1)

noise_scale is 1 in the paper and 1000 in OpenAI's networks, which are told of the noise as of a timestep.

*Not* assumed: what F is made of, or what its parameters are called.

References:
    Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
    Song et al. 2023, Consistency Models, arXiv 2303.01469 (noise_scale: their code).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """F: a network without its preconditioning."""

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Evaluate.

        Args:
            x: c_in x_t, (B, 3, H, W), in the precision of the layers.
            noise: c_noise, (B,), float32.
            condition: one-hot classes, (B, K), float32, a row of zeros for none; (B, 0) for an unconditional network.

        Returns:
            (B, 3, H, W), in the precision of the layers.
        """

    @abstractmethod
    def image_layers(self) -> Iterator[nn.Module]:
        """The layers that see the image, each with a ``weight``; not those that are told of noise level and class."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """From now on the backward pass computes activations again."""


class EdmNetwork(nn.Module):
    """A preconditioned network: x0 out of a noisy image, a noise level and a class.

    Coefficients are float32, whatever the precision of the layers; so is what is returned.

    Args:
        model: F.
        sigma_data: standard deviation of the data that F was trained for.
        noise_scale: factor of log(sigma) / 4 in what F is told of the noise.
    """

    def __init__(self, model: Backbone, sigma_data: float, noise_scale: float) -> None:
        super().__init__()
        self._sigma_data = sigma_data
        self._noise_scale = noise_scale / 4
        self.model = model

    def forward(self, x_t: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Denoise.

        Args:
            x_t: x0 + sigma eps, (B, 3, H, W), float32.
            sigma: noise level, () or (B,), float32.
            condition: one-hot classes, (B, K); (B, 0) for an unconditional network.

        Returns:
            x0, (B, 3, H, W), float32.
        """
        sigma = sigma.float().expand(len(x_t))
        s, data = sigma[:, None, None, None], self._sigma_data
        c_in = (s**2 + data**2).rsqrt()
        # In float64: at noise_scale 1000 a rounded logarithm moves what the network is told, and x0 by almost 1e-5.
        c_noise = (self._noise_scale * sigma.double().log()).float()
        prediction = self.model((c_in * x_t).to(self.layer_dtype), c_noise, condition.float())
        return data**2 * c_in**2 * x_t + s * data * c_in * prediction.float()

    @property
    def layer_dtype(self) -> torch.dtype:
        """Precision of the layers that see the image."""
        return next(self.model.image_layers()).weight.dtype

    def cast_layers(self, dtype: torch.dtype) -> Self:
        """Put all layers that see the image into a precision; those that see noise level and class stay in float32."""
        for layer in self.model.image_layers():
            layer.to(dtype)
        return self

    def enable_gradient_checkpointing(self) -> None:
        """From now on the backward pass computes activations again: less memory, more time."""
        self.model.enable_gradient_checkpointing()
