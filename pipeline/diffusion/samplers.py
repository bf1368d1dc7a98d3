"""Samplers: from pure noise to a clean sample, along the probability-flow ODE.

A denoiser D(x_t, t) = E[x0 | x_t] tells where x_t comes from, and thereby which way to go. Written in the noise level
of the EDM schedule, x = x0 + sigma n, the path from noise to data solves

    dx / dsigma = (x - D(x, sigma)) / sigma                                                     (EDM Eq. 1 with Eq. 3)

whose solution at sigma = 0 is a sample of the data. ``edm_heun`` integrates it with Heun's method, second order, two
evaluations a step. ``ddim`` is Euler's method in the variables x / alpha and sigma / alpha, first order, one evaluation
a step, on any schedule.

Precision: the state and the coefficients are float64, since hundreds of small differences are added up in them; the
denoiser sees float32. *Not* assumed: that the denoiser is a network, or anything about its condition, which is handed
through. Randomness is an argument. Gradients flow if torch records them: call under ``torch.no_grad()`` to sample.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Network
from pipeline.diffusion.schedules import NoiseSchedule


def edm_heun(
    denoiser: Network,
    noise: Tensor,
    condition: Tensor,
    sigmas: Tensor,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
    churn_noise: Callable[[int], Tensor] | None = None,
    record: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Integrate the ODE with Heun's method, after adding a little noise before each step if ``s_churn`` asks for it.

    Args:
        denoiser: (x_t float32, sigma float32 of shape (B,), condition) -> x0, on the EDM schedule.
        noise: unit Gaussian noise, shape (B, *); the sampler starts from noise * sigmas[0].
        condition: handed to the denoiser, shape (B, ...).
        sigmas: noise levels, shape (N + 1,), float64, strictly decreasing, usually
            :func:`~pipeline.diffusion.schedules.karras_sigmas`. The step to 0 costs one evaluation, any other two.
        s_churn: S_churn, the amount of noise added over all steps; 0 is the deterministic ODE.
        s_min: S_tmin, the smallest level at which noise is added.
        s_max: S_tmax, the largest level at which noise is added.
        s_noise: S_noise, the standard deviation of the added noise.
        churn_noise: step index 0 .. N - 1 -> unit Gaussian noise, shape (B, *). Called for the steps that add noise.
        record: called with the state at each of ``sigmas`` in turn, shape (B, *), float32: the trajectory.

    Returns:
        x at the last level, shape (B, *), float32.

    Raises:
        ValueError: ``s_churn`` without ``churn_noise``.

    References:
        Karras et al. 2022, arXiv 2206.00364, Algorithm 2.
    """
    if s_churn > 0 and churn_noise is None:
        raise ValueError("s_churn > 0 needs churn_noise: the noise that is added is the caller's to derive")
    levels = [float(sigma) for sigma in sigmas.cpu()]
    gamma = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)

    def slope(x: Tensor, sigma: float) -> Tensor:
        t = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        return (x - denoiser(x.float(), t, condition)) / sigma

    x = noise.double() * levels[0]
    if record:
        record(x.float())
    for step, (sigma, sigma_next) in enumerate(pairwise(levels)):
        sigma_hat = sigma
        if churn_noise and gamma > 0 and s_min <= sigma <= s_max:
            # Noise of the missing variance lifts x from sigma to sigma_hat (lines 4 to 6).
            sigma_hat = sigma * (1 + gamma)
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * s_noise * churn_noise(step).to(x)
        # Euler's step from sigma_hat to sigma_next (lines 7 and 8).
        step_size = sigma_next - sigma_hat
        slope_hat = slope(x, sigma_hat)
        x_next = x + step_size * slope_hat
        if sigma_next > 0:
            # Heun's correction: the same step again with the mean of the slopes at both ends (lines 9 to 11).
            x_next = x + step_size * (slope_hat + slope(x_next, sigma_next)) / 2
        x = x_next
        if record:
            record(x.float())
    return x.float()


def ddim(
    denoiser: Network,
    schedule: NoiseSchedule,
    x_T: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    *,
    record: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Step down the levels without fresh noise: predict x0, then mix it again with less of the same eps.

        eps = (x_t - alpha_t x0) / sigma_t,        x_s = alpha_s x0 + sigma_s eps

    The last step goes to alpha = 1, sigma = 0, so its result is the last x0 predicted.

    Args:
        denoiser: (x_t float32, t of shape (B,), condition) -> x0, on ``schedule``.
        schedule: the noise levels of ``timesteps``.
        x_T: the start, shape (B, *), already at the level of the first timestep: alpha_T x0 + sigma_T eps. For EDM that
            is noise * sigma_max, for variance-preserving schedules practically the noise itself.
        timesteps: shape (N,), strictly decreasing, sigma > 0 at all of them; integers for a
            :class:`~pipeline.diffusion.schedules.VPSchedule`, ``karras_sigmas(...)[:-1]`` for EDM.
        condition: handed to the denoiser, shape (B, ...).
        record: called with the state at each of ``timesteps`` and at the end, shape (B, *), float32: the trajectory.

    Returns:
        x0, shape (B, *), float32.

    References:
        Song et al. 2021, Denoising Diffusion Implicit Models, arXiv 2010.02502, Eq. 12 with eta = 0.
    """
    timesteps = timesteps.to(x_T.device, torch.float32 if timesteps.is_floating_point() else torch.int64)
    levels = [(float(alpha), float(sigma)) for alpha, sigma in zip(*schedule(timesteps.cpu()), strict=True)]
    levels.append((1.0, 0.0))

    x = x_T.double()
    if record:
        record(x.float())
    for t, ((alpha, sigma), (alpha_next, sigma_next)) in zip(timesteps, pairwise(levels), strict=True):
        x0 = denoiser(x.float(), t.expand(len(x)), condition).double()
        eps = (x - alpha * x0) / sigma
        x = alpha_next * x0 + sigma_next * eps
        if record:
            record(x.float())
    return x.float()
