"""A Gaussian mixture: the distribution whose perfect denoiser is known in closed form.

The data are K isotropic Gaussians, p(x0) = sum_k w_k N(x0; m_k, s_k^2 I). Perturbed, they are still Gaussians,

    p(x_t) = sum_k w_k N(x_t; alpha m_k, v_k I),        v_k = alpha^2 s_k^2 + sigma^2,

and Bayes' rule gives everything that a diffusion network has to learn. With r_k = P(k | x_t) the posterior weight of a
component, and within each component the usual regression of one Gaussian on another,

    E[x0 | x_t]       = sum_k r_k (m_k + alpha s_k^2 / v_k (x_t - alpha m_k))
    grad log p(x_t)   = sum_k r_k (alpha m_k - x_t) / v_k

The condition is a set of weights w, one per sample: a prompt that names some of the components gives the others
weight zero. So the mixture is a conditional teacher with nothing to train, and the ground truth for samplers.

*Not* assumed: a schedule, or that the components are far apart. Precision: everything inside is float64. The squared
distances come from one matrix product, |x|^2 - 2 alpha x.m + alpha^2 |m|^2, and for pictures these terms exceed what is
left of them by a factor that eats all the digits of float32.
"""

import math

import torch
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parametrization import append_dims
from pipeline.diffusion.schedules import NoiseSchedule


class GaussianMixture:
    """K isotropic Gaussians over tensors of any shape D.

    The arguments are kept as attributes of the same names, in float64, the weights normalised.

    Args:
        means: m, shape (K, *D).
        stds: s, shape (K,), positive; 0 makes a component a point and leaves p(x_t) defined for sigma > 0.
        log_weights: log w up to a common constant, shape (K,); -inf switches a component off.
    """

    def __init__(self, means: Tensor, stds: Tensor, log_weights: Tensor) -> None:
        self.means = means.double()
        self.stds = stds.double()
        self.log_weights = log_weights.double().log_softmax(-1)

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Return E[x0 | x_t], exactly.

        Args:
            x_t: noisy sample, shape (B, *D).
            alpha: coefficient of the signal, shape () or (B,).
            sigma: coefficient of the noise, shape () or (B,).
            log_weights: per sample, instead of the mixture's own: log w up to a constant, shape (B, K).

        Returns:
            x0, in the shape and dtype of x_t.
        """
        log_joint, variance = self._log_joint(x_t, alpha, sigma, log_weights)
        alpha, sigma = append_dims(alpha.double(), 2), append_dims(sigma.double(), 2)
        posterior = log_joint.softmax(1)
        # m + gain (x - alpha m) with gain = alpha s^2 / v is gain x + (sigma^2 / v) m: nothing cancels, one product.
        from_x = (posterior * alpha * self.stds**2 / variance).sum(1, keepdim=True)
        from_means = posterior * sigma**2 / variance
        x0 = from_x * x_t.double().flatten(1) + from_means @ self.means.flatten(1)
        return x0.view_as(x_t).to(x_t.dtype)

    def score(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Return grad log p(x_t), exactly; arguments and result as :meth:`denoise` has them.

        It equals (alpha x0 - x_t) / sigma^2, but is summed up directly, so that it keeps its digits as sigma -> 0.
        """
        log_joint, variance = self._log_joint(x_t, alpha, sigma, log_weights)
        weights = log_joint.softmax(1) / variance
        pull = append_dims(alpha.double(), 2) * (weights @ self.means.flatten(1))
        score = pull - weights.sum(1, keepdim=True) * x_t.double().flatten(1)
        return score.view_as(x_t).to(x_t.dtype)

    def log_density(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Return log p(x_t) in nats, shape (B,), float64; arguments as :meth:`denoise` has them."""
        return self._log_joint(x_t, alpha, sigma, log_weights)[0].logsumexp(1)

    def sample(self, count: int, generator: torch.Generator, log_weights: Tensor | None = None) -> Tensor:
        """Draw clean samples.

        Args:
            count: number of samples B.
            generator: the source of randomness, on the device of the mixture.
            log_weights: per sample, instead of the mixture's own: log w up to a constant, shape (B, K).

        Returns:
            x0, shape (B, *D), float32.
        """
        weights = (self.log_weights.expand(count, -1) if log_weights is None else log_weights.double()).softmax(1)
        component = weights.multinomial(1, generator=generator).squeeze(1)
        means = self.means[component]
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        return (means + append_dims(self.stds[component], means.ndim) * noise).float()

    def as_denoiser(self, schedule: NoiseSchedule) -> Denoiser:
        """Return the perfect denoiser on a schedule; its condition is ``log_weights``, shape (B, K)."""

        def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
            alpha, sigma = schedule(t)
            return self.denoise(x_t, alpha, sigma, condition)

        return Denoiser(network, schedule, "x0")

    def _log_joint(
        self, x_t: Tensor, alpha: Tensor, sigma: Tensor, log_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return log w_k + log N(x_t; alpha m_k, v_k I), shape (B, K), and v, shape (1, K) or (B, K)."""
        x, means = x_t.double().flatten(1), self.means.flatten(1)
        alpha, sigma = append_dims(alpha.double(), 2), append_dims(sigma.double(), 2)
        variance = alpha**2 * self.stds**2 + sigma**2
        squared_distance = (x**2).sum(1, keepdim=True) - 2 * alpha * (x @ means.T) + alpha**2 * (means**2).sum(1)
        log_normal = -(squared_distance / variance + x.shape[1] * torch.log(2 * math.pi * variance)) / 2
        log_prior = self.log_weights if log_weights is None else log_weights.double().log_softmax(1)
        return log_prior + log_normal, variance
