"""The losses of DMD as functions of tensors: no network, no randomness, no state.

All tensors are float32; rounding them to bfloat16 would leave nothing of a difference of two scores that agree to three
digits. B samples of shape *; a mean is over every element unless it says otherwise.

References:
    Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
"""

from typing import Literal

import torch
from torch import Tensor

from pipeline.diffusion.parametrization import append_dims

SIGMA_DATA = 0.5
"""Standard deviation of the data as EDM assumes it (Karras et al. 2022, Table 1)."""

SMALLEST_WEIGHT = 1e-6
"""Below this, mean |x0 - x0_real| of Eq. 8 is not divided by: the teacher agrees with the sample to all digits."""


def distribution_matching_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """The direction in which a sample's likelihood ratio of fake to real grows (Algorithm 2).

        g = (x0_fake - x0_real) / mean |x0 - x0_real|

    With the scores s = -(x_t - alpha x0) / sigma^2 of Eq. 4 and 5 this is w_t (s_fake - s_real) for the weight w_t of
    Eq. 8, up to the factor alpha_t that Eq. 7 has and Algorithm 2 leaves out.

    Args:
        x0: the student's sample, shape (B, *).
        x0_real: what the teacher, guided, makes of it when it is noised, shape (B, *).
        x0_fake: what the fake score makes of it, shape (B, *).

    Returns:
        g, shape (B, *), one weight per sample; the denominator is at least SMALLEST_WEIGHT.
    """
    weight = (x0 - x0_real).abs().flatten(1).mean(1).clamp_min(SMALLEST_WEIGHT)
    return (x0_fake - x0_real) / append_dims(weight, x0.ndim)


def distribution_matching_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient with respect to x0 is ``gradient`` / number of elements (Algorithm 2).

        L = 1/2 mean (x0 - stopgrad(x0 - g))^2,        dL/dx0 = g / (B * elements of a sample)

    Its value, mean g^2 / 2, says how strongly the distributions disagree in the eyes of the two scores; it does not
    fall steadily and is no measure of quality.

    Args:
        x0: the student's sample with its graph, shape (B, *).
        gradient: g, shape (B, *), without a graph.
    """
    return 0.5 * torch.nn.functional.mse_loss(x0, (x0 - gradient).detach())


def denoising_loss(x0_fake: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """What the fake score is trained on: mean over samples and elements of weight * (x0_fake - x0)^2 (Eq. 6).

    Args:
        x0_fake: the fake score's prediction, shape (B, *).
        x0: the student's sample that was noised, shape (B, *), without a graph.
        weight: of each sample, shape (B,).
    """
    return (append_dims(weight, x0.ndim) * (x0_fake - x0) ** 2).mean()


def critic_weight(alpha: Tensor, sigma: Tensor, weighting: Literal["snr", "edm", "x0"]) -> Tensor:
    """The weight of the squared error in x0 at a noise level.

        snr   alpha^2 / sigma^2                 the squared error in eps (Ho et al. 2020, L_simple)
        edm   sigma^-2 + sigma_data^-2          EDM's weight (Karras et al. 2022, Table 1; DMD's Algorithm 3)
        x0    1

    Args:
        alpha: coefficient of the signal, shape (B,).
        sigma: coefficient of the noise, shape (B,), positive.
        weighting: which one.

    Returns:
        Shape (B,).
    """
    match weighting:
        case "snr":
            return (alpha / sigma) ** 2
        case "edm":
            return sigma**-2 + SIGMA_DATA**-2
        case "x0":
            return torch.ones_like(sigma)


def finite_samples(*tensors: Tensor) -> Tensor:
    """Say of each sample whether all of its elements are finite in all of the tensors: shape (B,), bool."""
    return torch.stack([tensor.detach().isfinite().flatten(1).all(1) for tensor in tensors]).all(0)
