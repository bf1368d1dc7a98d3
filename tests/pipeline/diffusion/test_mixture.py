import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule

LEVELS = [(1.0, 0.002), (1.0, 0.4), (1.0, 80.0), (0.8, 0.6), (0.07, 0.9976), (0.0, 1.0), (0.5, 0.5)]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture
def plane() -> GaussianMixture:
    """Three components in the plane, of different width and weight."""
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.9], [0.2, -1.1]])
    return GaussianMixture(means, torch.tensor([0.3, 0.1, 0.6]), torch.tensor([0.5, 0.2, 0.3]).log())


@pytest.fixture
def pictures(generator: torch.Generator) -> GaussianMixture:
    """A hundred pictures in [-1, 1] with narrow components: the size of the toy teacher."""
    means = torch.rand(100, 3, 32, 32, generator=generator) * 2 - 1
    return GaussianMixture(means, torch.full((100,), 0.05), torch.zeros(100))


def reference(mixture: GaussianMixture, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 and score by the textbook sum over components, float64, differences first: no expanded squares."""
    dims = tuple(range(2, x_t.ndim + 1))
    column = [-1, 1] + [1] * (x_t.ndim - 1)
    alpha, sigma = (c.double().expand(len(x_t)).reshape(column) for c in (alpha, sigma))
    row = [1, -1] + [1] * (x_t.ndim - 1)
    stds = mixture.stds.view(row)
    variance = alpha**2 * stds**2 + sigma**2
    difference = x_t.double()[:, None] - alpha * mixture.means[None]
    log_normal = -(difference**2 / variance + torch.log(2 * math.pi * variance)).sum(dims) / 2
    posterior = (mixture.log_weights + log_normal).softmax(1).view(*log_normal.shape, *[1] * (x_t.ndim - 1))
    x0 = (posterior * (mixture.means[None] + alpha * stds**2 / variance * difference)).sum(1)
    return x0, (posterior * -difference / variance).sum(1)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.4), (0.8, 0.6), (0.3, 0.95)])
def test_denoiser_is_the_integral_over_the_posterior(plane: GaussianMixture, alpha: float, sigma: float) -> None:
    """E[x0 | x_t] by brute force: the prior density times the likelihood, summed over a fine grid of the plane."""
    ticks = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    x0 = torch.cartesian_prod(ticks, ticks)
    log_prior = plane.log_density(x0, scalar(1), scalar(0))
    # The prior itself integrates to one.
    assert log_prior.exp().sum().item() * 0.01**2 == pytest.approx(1, abs=1e-6)
    for x_t in torch.tensor([[0.0, 0.0], [-0.9, 0.3], [1.5, -2.0]], dtype=torch.float64):
        log_likelihood = -((x_t - alpha * x0) ** 2).sum(1) / (2 * sigma**2)
        posterior = (log_prior + log_likelihood).softmax(0)
        expected = posterior @ x0
        denoised = plane.denoise(x_t[None], scalar(alpha), scalar(sigma))[0]
        torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-6)


def test_log_density_is_the_sum_of_torch_normals(plane: GaussianMixture, generator: torch.Generator) -> None:
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    variance = 0.7**2 * plane.stds**2 + 0.2**2
    normals = torch.distributions.Independent(
        torch.distributions.Normal(0.7 * plane.means, variance.sqrt()[:, None].expand(3, 2)), 1
    )
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=plane.log_weights), normals)
    torch.testing.assert_close(plane.log_density(x, scalar(0.7), scalar(0.2)), mixture.log_prob(x))


@settings(max_examples=50)
@given(
    alpha=st.floats(0.05, 1.5),
    sigma=st.floats(0.05, 20),
    x=st.lists(st.floats(-20, 20), min_size=2, max_size=2),
    weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_tweedie(alpha: float, sigma: float, x: list[float], weights: list[float]) -> None:
    """The score is the gradient of the log-density, and the denoiser is x_t moved along it: Tweedie's formula."""
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.9], [0.2, -1.1]])
    mixture = GaussianMixture(means, torch.tensor([0.3, 0.1, 0.6]), torch.tensor(weights))
    x_t = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    a, s = scalar(alpha), scalar(sigma)
    (gradient,) = torch.autograd.grad(mixture.log_density(x_t, a, s).sum(), x_t)
    x_t = x_t.detach()
    torch.testing.assert_close(mixture.score(x_t, a, s), gradient, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(mixture.denoise(x_t, a, s), (x_t + s**2 * gradient) / a, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
@pytest.mark.parametrize("shape", [(), (5,)])
def test_score_and_denoiser_agree(
    plane: GaussianMixture, alpha: float, sigma: float, shape: tuple[int, ...], generator: torch.Generator
) -> None:
    x_t = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    a, s = scalar(alpha).expand(shape), scalar(sigma).expand(shape)
    expected = (alpha * plane.denoise(x_t, a, s) - x_t) / sigma**2
    torch.testing.assert_close(plane.score(x_t, a, s), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("alpha", "sigma"), LEVELS)
def test_float32_pictures_lose_nothing(
    pictures: GaussianMixture, alpha: float, sigma: float, generator: torch.Generator
) -> None:
    """At sigma 80 a picture is far from every component, at 0.002 a breath from one: the digits must survive both."""
    x0 = pictures.sample(4, generator)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    a, s = torch.tensor(alpha), torch.tensor(sigma)
    expected_x0, expected_score = reference(pictures, x_t, a, s)
    denoised, score = pictures.denoise(x_t, a, s), pictures.score(x_t, a, s)
    assert denoised.dtype == score.dtype == torch.float32
    torch.testing.assert_close(denoised.double(), expected_x0, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(score.double(), expected_score, rtol=1e-6, atol=1e-6 / sigma)


def test_two_nearly_equal_pictures_are_told_apart(generator: torch.Generator) -> None:
    """In float32, |x|^2 - 2 x.m + |m|^2 would be off by several nats here, and the posterior a matter of luck."""
    base = torch.rand(3, 32, 32, generator=generator) * 2 - 1
    nudge = torch.randn(3, 32, 32, generator=generator)
    mixture = GaussianMixture(torch.stack([base, base + 5e-5 * nudge]), torch.full((2,), 2**-9), torch.zeros(2))
    x_t = base[None] + 2**-9 * torch.randn(1, 3, 32, 32, generator=generator)
    only_first, only_second = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    first = mixture.log_density(x_t, scalar(1), scalar(2**-9), only_first)
    second = mixture.log_density(x_t, scalar(1), scalar(2**-9), only_second)
    distances = ((x_t.double() - mixture.means) ** 2).sum((1, 2, 3))
    log_odds = (distances[1] - distances[0]) / (2 * 2 * 2**-18)
    assert 0.1 < log_odds.abs() < 10
    torch.testing.assert_close(first - second, log_odds[None], rtol=1e-5, atol=1e-5)


def test_far_away_from_everything(plane: GaussianMixture) -> None:
    """Every component's density underflows; the posterior is still a distribution and picks the widest one."""
    x_t = torch.tensor([[1e4, -1e4]])
    denoised = plane.denoise(x_t, torch.tensor(1.0), torch.tensor(0.01))
    only_widest = plane.denoise(x_t, torch.tensor(1.0), torch.tensor(0.01), torch.tensor([[-math.inf, -math.inf, 0.0]]))
    torch.testing.assert_close(denoised, only_widest, rtol=0, atol=0)
    # One Gaussian: x shrinks towards its mean by s^2 / (s^2 + sigma^2).
    expected = torch.tensor([[0.2, -1.1]]) + 0.36 / 0.3601 * (x_t - torch.tensor([[0.2, -1.1]]))
    torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=0)


def test_each_sample_has_its_own_components(plane: GaussianMixture, generator: torch.Generator) -> None:
    """Weight zero is absence: the mixture answers as the smaller mixture would, row by row."""
    x_t = torch.randn(2, 2, generator=generator)
    a, s = torch.tensor([1.0, 0.7]), torch.tensor([0.5, 0.7])
    log_weights = torch.tensor([[0.0, 1.0, -math.inf], [-math.inf, 5.0, -math.inf]])
    for method in ("denoise", "score", "log_density"):
        together = getattr(plane, method)(x_t, a, s, log_weights)
        pair = GaussianMixture(plane.means[:2], plane.stds[:2], torch.tensor([0.0, 1.0]))
        single = GaussianMixture(plane.means[1:2], plane.stds[1:2], torch.tensor([0.0]))
        torch.testing.assert_close(together[:1], getattr(pair, method)(x_t[:1], a[:1], s[:1]))
        torch.testing.assert_close(together[1:], getattr(single, method)(x_t[1:], a[1:], s[1:]))


def test_weights_need_no_normalisation(plane: GaussianMixture, generator: torch.Generator) -> None:
    x_t = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    own = plane.log_density(x_t, scalar(1), scalar(1))
    shifted = plane.log_density(x_t, scalar(1), scalar(1), plane.log_weights.expand(3, -1) + 7)
    torch.testing.assert_close(shifted, own)
    torch.testing.assert_close(plane.log_weights.exp().sum(), scalar(1))


def test_as_denoiser_is_the_mixture_on_a_schedule(plane: GaussianMixture, generator: torch.Generator) -> None:
    x_t, t = torch.randn(2, 2, generator=generator), torch.tensor([0.3, 0.8])
    condition = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]])
    for schedule in (EDMSchedule(), FlowSchedule()):
        alpha, sigma = schedule(t)
        denoised = plane.as_denoiser(schedule)(x_t, t, condition)
        assert denoised.dtype == torch.float32
        assert torch.equal(denoised, plane.denoise(x_t, alpha, sigma, condition))


def test_samples_have_the_moments_of_the_mixture(plane: GaussianMixture, generator: torch.Generator) -> None:
    samples = plane.sample(40_000, generator).double()
    weights = plane.log_weights.exp()
    mean = weights @ plane.means
    second = weights @ (plane.means**2 + plane.stds[:, None] ** 2)
    torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.02)
    torch.testing.assert_close((samples**2).mean(0), second, rtol=0.03, atol=0)


def test_conditional_samples_stay_in_their_component(plane: GaussianMixture, generator: torch.Generator) -> None:
    component = torch.arange(3).repeat(5000)
    log_weights = torch.where(torch.nn.functional.one_hot(component).bool(), 0.0, -math.inf)
    samples = plane.sample(len(component), generator, log_weights).double()
    for k in range(3):
        own = samples[component == k]
        torch.testing.assert_close(own.mean(0), plane.means[k], rtol=0, atol=0.03)
        torch.testing.assert_close(own.std(0), plane.stds[k].expand(2), rtol=0.05, atol=0)


def test_the_generator_decides(plane: GaussianMixture) -> None:
    first, again, other = (plane.sample(8, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
