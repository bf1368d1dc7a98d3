"""Distillation in the plane: eight Gaussians on a circle, networks of 9,000 weights, the product's own losses.

All is as in a real run but for its size. Student and fake score start as copies of a network that has learnt to
denoise, the pairs come from the teacher's deterministic ODE, the losses are the trainer's. The teacher is exact, so
whatever is wrong with a student's samples is the distillation's doing.

Several students are trained side by side, from the same weights with different noise. They share nothing: their weights
are slices of the same tensors, their batches the parts of one large batch, and AdamW works element by element.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from configs.train_schema import LossConfig
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.samplers import edm_heun
from pipeline.diffusion.schedules import EDMSchedule, karras_sigmas
from tests.support.scores import OneStream
from trainer.dmd import DistributionMatching
from trainer.losses import SIGMA_DATA, critic_weight, denoising_loss
from trainer.regression import build_regression

MODES, RADIUS, STD = 8, 0.7, 0.08
"""Neighbours are 6.7 std apart; each coordinate has the standard deviation, 0.5, that EDM expects of data."""

SCHEDULE = EDMSchedule()
SIGMA_MAX = 80.0
LOSS = LossConfig(regression="l2", regression_space="latent")


def circle() -> GaussianMixture:
    """Eight equal Gaussians, evenly spaced."""
    angles = torch.arange(MODES) * (2 * math.pi / MODES)
    means = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    return GaussianMixture(means, torch.full((MODES,), STD), torch.zeros(MODES))


def no_prompt(count: int) -> Tensor:
    """The mixture's condition: equal weights, (count, 8)."""
    return torch.zeros(count, MODES)


class Planes(nn.Module):
    """M MLPs in EDM's preconditioning: (x_t, sigma, condition) -> x0; sample b goes to network b // (B / M)."""

    def __init__(self, weights: list[Tensor]) -> None:
        """``weights``: of every layer, (M, inputs + 1, outputs); the last row is the bias."""
        super().__init__()
        self.weights = nn.ParameterList(weights)

    @classmethod
    def random(cls, generator: torch.Generator, width: int = 64) -> "Planes":
        """One network."""
        sizes = [(2 + 8, width), (width, width), (width, width), (width, 2)]
        drawn = [torch.randn(1, inputs + 1, outputs, generator=generator) / inputs**0.5 for inputs, outputs in sizes]
        return cls(drawn)

    def copies(self, count: int) -> "Planes":
        """``count`` equal networks, of one."""
        return Planes([weight.detach().repeat(count, 1, 1) for weight in self.weights])

    def forward(self, x_t: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        sigma = sigma[:, None]
        scale = (sigma**2 + SIGMA_DATA**2).sqrt()
        octaves = sigma.log() / 4 * 2.0 ** torch.arange(4)
        h = torch.cat([x_t / scale, octaves.sin(), octaves.cos()], dim=1).unflatten(0, (len(self.weights[0]), -1))
        for layer, weight in enumerate(self.weights):
            h = torch.baddbmm(weight[:, -1:], nn.functional.silu(h) if layer else h, weight[:, :-1])
        return (SIGMA_DATA / scale) ** 2 * x_t + sigma * SIGMA_DATA / scale * h.flatten(0, 1)


@cache
def pretrained(steps: int = 1200, batch: int = 256) -> Planes:
    """A network that has learnt the mixture's denoiser: what a teacher's weights are to a student."""
    generator = torch.Generator().manual_seed(0)
    network, mixture, times = Planes.random(generator), circle(), SCHEDULE.training_times()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = mixture.sample(batch, generator)
        sigma = times[torch.randint(len(times), (batch,), generator=generator)]
        x_t = x0 + sigma[:, None] * torch.randn(x0.shape, generator=generator)
        target = mixture.denoise(x_t, torch.ones(()), sigma)
        prediction = network(x_t, sigma, no_prompt(batch))
        update(optimizer, denoising_loss(prediction, target, critic_weight(sigma, sigma, "edm")))
        decay.step()
    return network


@cache
def pairs(count: int) -> tuple[Tensor, Tensor]:
    """Noise and the end of the teacher's ODE path from it."""
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(1))
    sigmas = karras_sigmas(18, 0.002, SIGMA_MAX, 7.0)
    return z, edm_heun(circle().as_denoiser(SCHEDULE), z, no_prompt(count), sigmas)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """What a distillation does; ``critic_steps`` updates of the fake score for each of the student."""

    dm_weight: float = 1.0
    regression_weight: float = 1.0
    critic_steps: int = 1
    steps: int = 500
    batch: int = 128
    lr: float = 5e-4
    num_pairs: int = 2000


def distil(recipe: Recipe, students: int, seed: int = 0) -> OneStepGenerator:
    """Train ``students`` one-step generators by one recipe, in the order of the trainer's turns."""
    generator = torch.Generator().manual_seed(seed)
    count = students * recipe.batch
    network, critic = pretrained().copies(students), pretrained().copies(students)
    student = OneStepGenerator(Denoiser(network, SCHEDULE, "x0"), SCHEDULE, torch.tensor(SIGMA_MAX))
    matching = DistributionMatching(circle().as_denoiser(SCHEDULE), Denoiser(critic, SCHEDULE, "x0"), SCHEDULE, LOSS)
    regression = build_regression(LOSS, None, torch.device("cpu"))
    optimizer, critic_optimizer = (
        torch.optim.AdamW(trained.parameters(), lr=recipe.lr, weight_decay=0.01, fused=True)
        for trained in (network, critic)
    )
    condition, (pair_z, pair_x0) = no_prompt(count), pairs(recipe.num_pairs)

    def fresh_samples() -> Tensor:
        return student(torch.randn(count, 2, generator=generator), condition)

    for _ in range(recipe.steps):
        loss, samples = torch.zeros(()), []
        if recipe.dm_weight > 0:
            samples.append(fresh_samples())
            loss = recipe.dm_weight * matching.generator_loss(samples[0], condition, OneStream(generator))[0]
        if recipe.regression_weight > 0:
            rows = torch.randint(len(pair_z), (count,), generator=generator)
            distance = regression(student(pair_z[rows], condition), pair_x0[rows])
            loss = loss + recipe.regression_weight * distance.mean()
        update(optimizer, students * loss)
        if recipe.dm_weight > 0:
            with torch.no_grad():
                samples += [fresh_samples() for _ in range(recipe.critic_steps - 1)]
        for x0 in samples:
            update(critic_optimizer, students * matching.critic_loss(x0, condition, OneStream(generator)))
    return student


@dataclass(frozen=True)
class Coverage:
    """How the samples of one student are spread.

    Attributes:
        smallest: the smallest share of samples within 3 std of one mode; 0.124 for the data.
        inside: share of the samples within 3 std of any mode; 0.989 for the data.
        total_variation: of the modes' shares (each sample counts for the nearest) from 1/8: 0 is even, 7/8 one mode.
    """

    smallest: float
    inside: float
    total_variation: float


@torch.no_grad()
def coverage(student: OneStepGenerator, students: int, count: int = 8000) -> list[Coverage]:
    """Judge each of the students by ``count`` samples, of the same noise."""
    z = torch.randn(count, 2, generator=torch.Generator().manual_seed(2)).repeat(students, 1)
    found = []
    for x0 in student(z, no_prompt(len(z))).double().chunk(students):
        distance, nearest = torch.cdist(x0, circle().means).min(1)
        near = distance <= 3 * STD
        inside = torch.bincount(nearest[near], minlength=MODES) / count
        shares = torch.bincount(nearest, minlength=MODES) / count
        total_variation = (shares - 1 / MODES).abs().sum().item() / 2
        found.append(Coverage(inside.min().item(), inside.sum().item(), total_variation))
    return found
