"""Classifier-free guidance: a denoiser that listens harder to its condition.

    D_w(x_t, t, c) = D(x_t, t, none) + w (D(x_t, t, c) - D(x_t, t, none))

The scale w counts from the unconditional prediction: w = 0 ignores the condition, **w = 1 is no guidance**, w > 1
extrapolates beyond the conditional prediction. (Ho and Salimans write 1 + w for our w.)

The two terms have weights that sum to one and x0, eps, v, flow and score are affine in each other, so guiding any of
them guides all of them alike: the same function serves a denoiser and a raw network.

References:
    Ho and Salimans 2022, Classifier-Free Diffusion Guidance, arXiv 2207.12598.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Network


def guided(
    function: Network, x_t: Tensor, t: Tensor, condition: Tensor, unconditional: Tensor, guidance_scale: float
) -> Tensor:
    """Evaluate a network or a denoiser with guidance, in one call.

    With w = 1 or w = 0 one of the two terms vanishes and only the other one is evaluated, on a batch of B; otherwise
    both are, unconditional first, on a batch of 2B.

    Args:
        function: (x_t, t, condition) -> output of x_t's shape, row by row.
        x_t: noisy sample, shape (B, *).
        t: time, shape () or (B,).
        condition: shape (B, ...).
        unconditional: shape (1, ...) or (B, ...).
        guidance_scale: w.

    Returns:
        The guided output, shape (B, *), float32.
    """
    unconditional = unconditional.expand_as(condition)
    if guidance_scale == 1:
        return function(x_t, t, condition).float()
    if guidance_scale == 0:
        return function(x_t, t, unconditional).float()
    both = function(torch.cat([x_t, x_t]), t.expand(len(x_t)).repeat(2), torch.cat([unconditional, condition]))
    out_uncond, out_cond = both.float().chunk(2)
    return out_uncond + guidance_scale * (out_cond - out_uncond)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A denoiser around a denoiser: whoever calls it need not know about guidance.

    Args:
        denoiser: (x_t, t, condition) -> x0.
        unconditional: what stands for no condition, shape (1, ...) or (B, ...).
        guidance_scale: w; 1 is no guidance.
    """

    denoiser: Network
    unconditional: Tensor
    guidance_scale: float

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Return the guided clean sample, shape (B, *), float32; arguments as :class:`Denoiser` takes them."""
        return guided(self.denoiser, x_t, t, condition, self.unconditional, self.guidance_scale)
