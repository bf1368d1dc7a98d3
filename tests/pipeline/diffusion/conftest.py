"""What every test of the mathematics shares: explicit randomness, and one Gaussian whose every answer is known."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _global_random_state_is_untouched() -> Iterator[None]:
    """Nothing in the package draws from torch's global generator: checked around every single test."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240229)


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I) on the EDM schedule: the denoiser, and the exact solution of its probability-flow ODE."""

    mean: float
    std: float

    def denoiser(self, x_t: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        """Posterior mean (s^2 x + sigma^2 m) / (s^2 + sigma^2), in float64 so that only the sampler errs."""
        x, variance = x_t.double(), sigma.double().view(-1, *[1] * (x_t.ndim - 1)) ** 2
        return (self.std**2 * x + variance * self.mean) / (self.std**2 + variance)

    def solution(self, x: Tensor, sigma: float, sigma_end: float) -> Tensor:
        """The state at sigma_end of the path through x at sigma: the distance to the mean shrinks like the std."""
        shrink = ((self.std**2 + sigma_end**2) / (self.std**2 + sigma**2)) ** 0.5
        return self.mean + (x - self.mean) * shrink


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian(mean=0.3, std=0.5)
