"""Noise schedules: the map t -> (alpha_t, sigma_t).

A clean sample x0 is perturbed with unit Gaussian noise eps,

    x_t = alpha_t x0 + sigma_t eps,        eps ~ N(0, I),

and a schedule is nothing but the two coefficients as functions of t:

    variance preserving   alpha_t = sqrt(abar_t)    sigma_t = sqrt(1 - abar_t)    t = 0, 1, ..., T - 1
    EDM                   alpha_t = 1               sigma_t = t                   t in (0, inf)
    rectified flow        alpha_t = 1 - t           sigma_t = t                   t in (0, 1]

Assumed: the signal-to-noise ratio alpha_t^2 / sigma_t^2 decreases strictly with t. *Not* assumed: any relation
between alpha and sigma, a range of t, or that t is continuous. Whoever needs more says so.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    """Anything that maps a time to the coefficients of signal and noise."""

    @property
    def description(self) -> str:
        """The schedule in one line; equal descriptions mean equal coefficients."""
        ...

    def __call__(self, t: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, float32, on the device and in the shape of t: () or (B,)."""
        ...

    def prior_std(self, t: Tensor, /) -> Tensor:
        """Return the standard deviation of the pure noise that stands for x_t where a sampler starts, likewise."""
        ...

    def training_times(self) -> Tensor:
        """Return the T times that distillation draws from, shape (T,), with noise increasing."""
        ...


@dataclass(frozen=True)
class EDMSchedule:
    """The noise level itself is the time, and the signal is never scaled down.

    References:
        Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364.
    """

    description: ClassVar[str] = "edm"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1, t) for noise levels t > 0."""
        sigma = t.float()
        return torch.ones_like(sigma), sigma

    def prior_std(self, t: Tensor) -> Tensor:
        """Return t: the signal, of variance about 1, is not worth mentioning beside the noise."""
        return t.float()

    def training_times(self) -> Tensor:
        """Return Karras' grid of 1,000 levels from 0.002 to 80, as DMD has it (Yin et al. 2024, App. B.1), float32."""
        return karras_sigmas(1000, 0.002, 80.0, 7.0)[:-1].flip(0).float()


@dataclass(frozen=True)
class FlowSchedule:
    """A straight line from the sample at t = 0 to the noise at t = 1.

    References:
        Liu et al. 2022, Flow Straight and Fast, arXiv 2209.03003.
    """

    description: ClassVar[str] = "flow"

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - t, t) for times t in (0, 1]."""
        sigma = t.float()
        return 1 - sigma, sigma

    def prior_std(self, t: Tensor) -> Tensor:
        """Return 1: flows start at t = 1, where x_t is the noise itself."""
        return torch.ones_like(t, dtype=torch.float32)

    def training_times(self) -> Tensor:
        """Return 0.001, 0.002, ..., 1, float32."""
        return torch.arange(1, 1001, dtype=torch.float32) / 1000


@dataclass(frozen=True, eq=False)
class VPSchedule:
    """A table of T variance-preserving levels, alpha^2 + sigma^2 = 1, as discrete diffusion models are trained on.

    Args:
        alphas_cumprod: abar, shape (T,), float32, strictly decreasing in [0, 1].
        description: one line that determines the table.

    References:
        Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239, Eq. 4.
    """

    alphas_cumprod: Tensor
    description: str

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Look up integer timesteps.

        Args:
            t: indices in 0 .. T - 1, shape () or (B,), int64 or int32. There is no level between two indices: a
                floating-point t is refused, and so is an index outside of the table.

        Returns:
            sqrt(abar_t) and sqrt(1 - abar_t), float32, in the shape of t.

        Raises:
            IndexError: a timestep outside of the table (on a GPU, a device-side assertion).
            RuntimeError: a floating-point t.
        """
        # Not alphas_cumprod[t]: index_select refuses t = -1, where indexing would quietly answer with t = T - 1.
        alpha_squared = self.alphas_cumprod.to(t.device).index_select(0, t.flatten()).view(t.shape)
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def prior_std(self, t: Tensor) -> Tensor:
        """Return 1: whatever the level, x_t has variance 1, and so has the noise that stands for it."""
        return torch.ones_like(t, dtype=torch.float32)

    def training_times(self) -> Tensor:
        """Return the timesteps 0, 1, ..., T - 1, int64."""
        return torch.arange(len(self.alphas_cumprod))

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VPSchedule":
        """Build the table that a diffusers scheduler of this configuration was trained with.

        The table is computed in float32 and in diffusers' own order of operations, to the last bit: a network knows
        the levels it was trained on, rounding included.

        Args:
            config: entries of a scheduler's ``config`` or ``scheduler_config.json``. Either ``trained_betas``, or
                ``beta_schedule`` (linear, scaled_linear, squaredcos_cap_v2, laplace or sigmoid),
                ``num_train_timesteps`` and, unless the schedule goes without, ``beta_start`` and ``beta_end``; and
                optionally ``rescale_betas_zero_snr``. Their defaults differ between scheduler classes, so none is
                guessed. With zero SNR at the last timestep alpha is 0 there: eps no longer determines x0, v does.

        Raises:
            ValueError: an entry is missing, or the beta schedule is unknown.
        """
        betas, description = _betas(config)
        if config.get("rescale_betas_zero_snr"):
            betas, description = _rescale_zero_snr(betas), f"{description}:zero_snr"
        return cls(torch.cumprod(1.0 - betas, dim=0), description)


def _betas(config: Mapping[str, Any]) -> tuple[Tensor, str]:
    """Return beta_t = 1 - abar_t / abar_{t-1} of a diffusers scheduler config, shape (T,), and its description."""
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        digest = hashlib.sha256(betas.numpy().astype("<f4").tobytes()).hexdigest()
        return betas, f"vp:trained:{digest[:12]}:{len(betas)}"

    def entry(name: str) -> Any:
        if name not in config:
            raise ValueError(f"the scheduler config has no {name}: a variance-preserving schedule needs it")
        return config[name]

    name, steps = str(entry("beta_schedule")), int(entry("num_train_timesteps"))
    if name == "squaredcos_cap_v2":
        return _betas_from(_cosine_alpha_bar, steps), f"vp:{name}:{steps}"
    if name == "laplace":
        return _betas_from(_laplace_alpha_bar, steps), f"vp:{name}:{steps}"

    start, end = float(entry("beta_start")), float(entry("beta_end"))
    description = f"vp:{name}:{start}:{end}:{steps}"
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32), description
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2, description
    if name == "sigmoid":
        return torch.linspace(-6, 6, steps, dtype=torch.float32).sigmoid() * (end - start) + start, description
    raise ValueError(
        f"beta_schedule {name!r} is unknown: use linear, scaled_linear, squaredcos_cap_v2, laplace or sigmoid"
    )


def _betas_from(alpha_bar: Callable[[float], float], steps: int) -> Tensor:
    """Cut a continuous abar(u), u in [0, 1], into ``steps`` betas of at most 0.999."""
    edges = [alpha_bar(i / steps) for i in range(steps + 1)]
    return torch.tensor([min(1 - after / before, 0.999) for before, after in pairwise(edges)], dtype=torch.float32)


def _cosine_alpha_bar(u: float) -> float:
    """Nichol and Dhariwal 2021, arXiv 2102.09672, Eq. 17."""
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace_alpha_bar(u: float) -> float:
    """Hang et al. 2024, arXiv 2407.03297: log SNR follows a Laplace distribution; the square root is diffusers' own."""
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    snr = math.exp(log_snr)
    return math.sqrt(snr / (1 + snr))


def _rescale_zero_snr(betas: Tensor) -> Tensor:
    """Shift and stretch sqrt(abar) so that it ends at exactly 0 and starts where it did.

    References:
        Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891, Algorithm 1.
    """
    alpha = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = alpha[0], alpha[-1]
    alphas_cumprod = ((alpha - last) * (first / (first - last))) ** 2
    ratios = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - ratios


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Return the noise levels of EDM's samplers: evenly spaced in sigma^(1/rho), so denser towards small noise.

    Args:
        steps: number of levels from sigma_max down to sigma_min; a single one is sigma_max.
        sigma_min: smallest level.
        sigma_max: largest level.
        rho: exponent of the grid; 1 is even spacing in sigma, EDM uses 7.

    Returns:
        Shape (steps + 1,), float64, strictly decreasing; the last entry, appended, is 0.

    References:
        Karras et al. 2022, arXiv 2206.00364, Eq. 5.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    largest, smallest = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = (largest + ramp * (smallest - largest)) ** rho
    # The ends to the last bit, so that comparing a level with sigma_max means what it says.
    levels[-1], levels[0] = sigma_min, sigma_max
    return torch.cat([levels, levels.new_zeros(1)])
