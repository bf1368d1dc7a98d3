"""Distribution Matching Distillation: the paper in one file.

The student G is to make p_fake, the distribution of its samples, equal p_real, the teacher's. The gradient of
KL(p_fake || p_real), with both blurred by noise so that they overlap, is a difference of scores:

    grad KL = E_{z, t, eps} [ w_t alpha_t (s_fake(x_t, t) - s_real(x_t, t)) dG/dtheta ],                        (Eq. 7)
    x_t = alpha_t x0 + sigma_t eps,  x0 = G(z)

s_real is the frozen teacher. s_fake is a second network, started as a copy of the teacher and trained all along to
denoise the student's samples (Eq. 6): the critic. With denoisers mu instead of scores, and with the weight of Eq. 8,

    g = (mu_fake(x_t, t) - mu_real(x_t, t)) / mean |x0 - mu_real(x_t, t)|                                  (Algorithm 2)

is what a sample should move against. What the paper's Eq. 7 and 8 have besides is a factor alpha_t; it is an option.

Guidance belongs to the real score alone: the fake score models the student's samples as they are. Every quantity
outside of a network call is float32. *Not* assumed: a schedule, a parametrization, or what a condition is.

References:
    Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from configs.train_schema import LossConfig
from pipeline.diffusion.denoiser import Network
from pipeline.diffusion.parametrization import append_dims
from pipeline.diffusion.schedules import EDMSchedule, NoiseSchedule
from trainer.losses import (
    critic_weight,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    finite_samples,
)
from trainer.randomness import Draws


@dataclass(frozen=True)
class ScoreComparison:
    """What the two scores said of a batch, for whoever watches. Nothing here has a graph.

    Attributes:
        time: index among the T training times, shape (B,), int64.
        gradient: g, zero for samples that are not finite, shape (B, *).
        x0_real: the teacher's prediction, shape (B, *).
        x0_fake: the fake score's prediction, shape (B, *).
        is_finite: whether everything about a sample is finite, shape (B,), bool.
    """

    time: Tensor
    gradient: Tensor
    x0_real: Tensor
    x0_fake: Tensor
    is_finite: Tensor


class DistributionMatching:
    """The two losses of DMD.

    Args:
        real_score: the frozen teacher as a denoiser, guided: (x_t, t, condition) -> x0 float32.
        fake_score: the critic as a denoiser, never guided.
        schedule: of both.
        loss: the range of times, the form of the gradient, the critic's weighting.
    """

    def __init__(self, real_score: Network, fake_score: Network, schedule: NoiseSchedule, loss: LossConfig) -> None:
        self.real_score = real_score
        self.fake_score = fake_score
        self.schedule = schedule
        self.times = schedule.training_times()
        num_times = len(self.times)
        self.last_time = min(round(loss.t_max * num_times), num_times - 1)
        self.first_time = min(round(loss.t_min * num_times), self.last_time)
        self.times_alpha = loss.dm_gradient == "equation_7"
        self.weighting = loss.critic_weighting or ("edm" if isinstance(schedule, EDMSchedule) else "snr")

    def generator_loss(self, x0: Tensor, condition: Tensor, draws: Draws) -> tuple[Tensor, ScoreComparison]:
        """Compare the scores at the student's samples and turn the difference into a loss (Algorithm 2).

        A sample for which anything is not finite contributes nothing and is marked; the mean is still over all B.

        Args:
            x0: the student's samples with their graph, shape (B, *), float32.
            condition: shape (B, ...).
            draws: source of times and noise, on x0's device.

        Returns:
            The loss, shape (), and what it was made of.
        """
        with torch.no_grad():
            time = draws.integers(self.first_time, self.last_time, len(x0))
            t = self.times.to(x0.device)[time]
            x_t, alpha, _ = self._add_noise(x0, t, draws)
            x0_real = self.real_score(x_t, t, condition)
            x0_fake = self.fake_score(x_t, t, condition)
            gradient = distribution_matching_gradient(x0, x0_real, x0_fake)
            if self.times_alpha:
                gradient = append_dims(alpha, x0.ndim) * gradient
            is_finite = finite_samples(x0, gradient)
            gradient = torch.where(append_dims(is_finite, x0.ndim), gradient, 0)
        kept = torch.where(append_dims(is_finite, x0.ndim), x0, 0)
        return distribution_matching_loss(kept, gradient), ScoreComparison(time, gradient, x0_real, x0_fake, is_finite)

    def critic_loss(self, x0: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Have the fake score denoise the student's samples (Eq. 6), at any of the T times.

        A sample that is not finite contributes nothing; the mean is still over all B.

        Args:
            x0: the student's samples, shape (B, *), float32; their graph is cut here.
            condition: shape (B, ...).
            draws: source of times and noise, on x0's device.

        Returns:
            The loss, shape ().
        """
        is_finite = finite_samples(x0)
        x0 = torch.where(append_dims(is_finite, x0.ndim), x0.detach(), 0)
        t = self.times.to(x0.device)[draws.integers(0, len(self.times) - 1, len(x0))]
        x_t, alpha, sigma = self._add_noise(x0, t, draws)
        weight = is_finite * critic_weight(alpha, sigma, self.weighting)
        return denoising_loss(self.fake_score(x_t, t, condition), x0, weight)

    def _add_noise(self, x0: Tensor, t: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """x_t, and alpha and sigma of shape (B,)."""
        alpha, sigma = self.schedule(t)
        eps = draws.normal(x0.shape)
        return append_dims(alpha, x0.ndim) * x0 + append_dims(sigma, x0.ndim) * eps, alpha, sigma
