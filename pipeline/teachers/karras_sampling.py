"""Samplers on Karras' grid, for teachers on the EDM schedule."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from configs.schema import DdimSampler, EdmHeunSampler
from pipeline.diffusion.denoiser import Network
from pipeline.diffusion.samplers import ddim, edm_heun
from pipeline.diffusion.schedules import EDMSchedule, karras_sigmas
from pipeline.noise import noise as derived_noise


def sample(
    denoiser: Network,
    noise: Tensor,
    condition: Tensor,
    sampler: EdmHeunSampler | DdimSampler,
    *,
    seed: int,
    sample_ids: Sequence[int],
) -> Tensor:
    """Run ``edm_heun`` or ``ddim``; see :meth:`pipeline.teachers.base.Teacher.sample`.

    Args:
        denoiser: (x_t, sigma, condition) -> x0, guided if need be.
        noise: (B, *), float32, unit variance.
        condition: (B, ...).
        sampler: which, and its settings.
        seed: root of the noise that churn adds.
        sample_ids: B ids; the noise added to a sample derives from (seed, id, step).

    Returns:
        x0, (B, *), float32.
    """
    sigmas = karras_sigmas(sampler.steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)
    if sampler.name == "ddim":
        return ddim(denoiser, EDMSchedule(), noise * sampler.sigma_max, sigmas[:-1], condition)

    def churn_noise(step: int) -> Tensor:
        stream = f"step{step}"
        added = [derived_noise(seed, sample_id, noise.shape[1:], stream) for sample_id in sample_ids]
        return torch.from_numpy(np.stack(added)).to(noise.device, torch.float32)

    return edm_heun(
        denoiser,
        noise,
        condition,
        sigmas,
        s_churn=sampler.s_churn,
        s_min=sampler.s_min,
        s_max=math.inf if sampler.s_max is None else sampler.s_max,
        s_noise=sampler.s_noise,
        churn_noise=churn_noise,
    )


def num_predictions(sampler: EdmHeunSampler | DdimSampler) -> int:
    """How often one sample calls the denoiser: Heun's method twice a step, but once in the last."""
    return 2 * sampler.steps - 1 if sampler.name == "edm_heun" else sampler.steps
