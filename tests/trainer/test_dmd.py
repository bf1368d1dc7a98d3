"""Distribution matching against what is known in closed form."""

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from support.scores import (
    NOTHING,
    SCHEDULES,
    SHAPE,
    VP,
    Affine,
    OneStream,
    Spy,
    at_one_time,
    constant,
    draws,
    in_bfloat16,
    matching,
    normal,
    rng,
)
from torch import Tensor, nn

from pipeline.diffusion.denoiser import Denoiser, Network
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.diffusion.guidance import GuidedDenoiser
from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.parametrization import Parametrization, append_dims
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule


@pytest.fixture(autouse=True)
def _global_random_state_is_untouched() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------ exact identities


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
@pytest.mark.parametrize("parametrization", ["eps", "x0", "v"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_equal_scores_leave_nothing_to_learn(
    schedule: NoiseSchedule, parametrization: Parametrization, precision: str
) -> None:
    """Before the first step the fake score is the teacher's copy: loss and gradient are 0, not almost."""
    student, teacher, fake = Affine(0), Affine(0), Affine(0)
    call = in_bfloat16 if precision == "bfloat16" else lambda network: network
    real_score = GuidedDenoiser(Denoiser(call(teacher), schedule, parametrization), torch.zeros(1, 1), 1.0)
    dmd = matching(real_score, Denoiser(call(fake), schedule, parametrization), schedule)
    generator = OneStepGenerator(Denoiser(call(student), schedule, parametrization), schedule, dmd.times[-2])
    loss, comparison = dmd.generator_loss(generator(normal(0), NOTHING), NOTHING, draws())
    loss.backward()
    assert loss.item() == 0
    assert comparison.gradient.eq(0).all()
    assert comparison.is_finite.all()
    assert all(parameter.grad is not None and parameter.grad.eq(0).all() for parameter in student.parameters())
    # Another fake score, and there is something.
    dmd = matching(real_score, Denoiser(call(Affine(1)), schedule, parametrization), schedule)
    assert dmd.generator_loss(normal(0), NOTHING, draws())[0] > 0


def test_a_fake_score_that_returns_the_sample_gives_mean_magnitude_one() -> None:
    x0 = normal(0) * torch.logspace(-3, 3, 8).view(-1, 1, 1, 1)
    _, comparison = matching(constant(0.3), lambda *_: x0, VP).generator_loss(x0, NOTHING, draws())
    torch.testing.assert_close(comparison.gradient.abs().flatten(1).mean(1), torch.ones(8))


def test_the_students_gradient_is_g_over_the_number_of_elements() -> None:
    x0 = normal(0).requires_grad_()
    loss, comparison = matching(Affine(0), Affine(2), EDMSchedule()).generator_loss(x0, NOTHING, draws())
    loss.backward()
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, comparison.gradient / math.prod(SHAPE))
    torch.testing.assert_close(loss.detach(), comparison.gradient.square().mean() / 2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
def test_equation_7_has_alpha_where_algorithm_2_has_none(schedule: NoiseSchedule) -> None:
    real, fake, x0 = Affine(0), Affine(2), normal(0)
    _, plain = matching(real, fake, schedule).generator_loss(x0, NOTHING, draws())
    dmd = matching(real, fake, schedule, dm_gradient="equation_7")
    _, weighted = dmd.generator_loss(x0, NOTHING, draws())
    alpha, _ = schedule(dmd.times[plain.time])
    assert torch.equal(weighted.gradient, append_dims(alpha, 4) * plain.gradient)


# ---------------------------------------------------------------------------------------- scores in closed form


def two_modes(shift: Tensor) -> GaussianMixture:
    """On a line: two Gaussians, moved by ``shift``."""
    means = torch.tensor([[-0.6], [0.5]], dtype=torch.float64) + shift
    return GaussianMixture(means, torch.tensor([0.3, 0.15]), torch.tensor([0.3, 0.7]).log())


REAL = GaussianMixture(torch.tensor([[-0.2], [0.9], [1.4]]), torch.tensor([0.4, 0.2, 0.1]), torch.tensor([0.0, 1, 0]))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
def test_gradient_is_the_weighted_difference_of_the_true_scores(schedule: NoiseSchedule) -> None:
    """Eq. 7 and 8 as they are printed, with scores that are not computed through denoisers; all in float64."""
    means = normal(5, (5, 16))
    fake, real = (
        GaussianMixture(m, torch.tensor(stds), torch.zeros(len(m)))
        for m, stds in ((means[:2], [0.3, 0.15]), (means[2:], [0.4, 0.2, 0.1]))
    )
    spy = Spy(lambda x_t, t, _: real.denoise(x_t, *schedule(t)))
    dmd = matching(spy, lambda x_t, t, _: fake.denoise(x_t, *schedule(t)), schedule, dm_gradient="equation_7")
    x0 = fake.sample(64, rng(1)).double()
    _, comparison = dmd.generator_loss(x0, NOTHING, draws())
    (x_t, t, _), column = spy.calls[0], partial(append_dims, ndim=2)
    alpha, sigma = (c.double() for c in schedule(t))
    mu_real = (x_t + column(sigma**2) * real.score(x_t, alpha, sigma)) / column(alpha)
    w_t = column(sigma**2 / alpha) * x0.shape[1] / (mu_real - x0).abs().sum(1, keepdim=True)
    expected = w_t * column(alpha) * (fake.score(x_t, alpha, sigma) - real.score(x_t, alpha, sigma))
    assert comparison.gradient.dtype == torch.float64
    torch.testing.assert_close(comparison.gradient, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("schedule", "time"), [(VP, 300), (VP, 700), (EDMSchedule(), 500), (FlowSchedule(), 400)])
def test_expected_gradient_is_that_of_the_divergence(schedule: NoiseSchedule, time: int) -> None:
    """E[alpha (s_fake - s_real)] = d/dtheta KL(p_fake,t || p_real,t) for the student x0 = z' + theta, dG/dtheta = 1.

    The left side is a Monte Carlo mean over what the loss made of 200,000 samples, its weight divided out; the right
    side is the derivative of an integral over a fine grid, and knows neither scores nor denoisers.
    """
    theta = torch.tensor([0.25], dtype=torch.float64, requires_grad=True)
    count, shift = 200_000, theta.detach()
    x0 = two_modes(shift).sample(count, rng(1))
    alpha, sigma = (c.double() for c in schedule(schedule.training_times()[time]))
    dmd = matching(
        lambda x_t, t, _: REAL.denoise(x_t, *schedule(t)),
        lambda x_t, t, _: two_modes(shift).denoise(x_t, *schedule(t)),
        schedule,
        **at_one_time(1000, time),
    )
    _, comparison = dmd.generator_loss(x0, NOTHING, draws())
    assert comparison.time.eq(time).all()
    weight = (x0 - comparison.x0_real).abs().double() * alpha / sigma**2  # g has 1 / this, apart from alpha
    estimates = comparison.gradient.double() * weight * alpha
    mean, error = estimates.mean().item(), (estimates.std() / count**0.5).item()

    width = 12 * (1 + sigma.item())
    grid = torch.linspace(-width, width, 40_001, dtype=torch.float64)[:, None]
    log_fake = two_modes(theta).log_density(grid, alpha, sigma)
    divergence = (log_fake.exp() * (log_fake - REAL.log_density(grid, alpha, sigma))).sum() * (grid[1] - grid[0])
    (derivative,) = torch.autograd.grad(divergence.sum(), theta)
    assert abs(derivative.item()) > 25 * error  # the sample is large enough to tell
    assert mean == pytest.approx(derivative.item(), abs=4 * error)


def test_descending_moves_a_student_onto_the_data() -> None:
    """A shifted Gaussian with exact scores, by the loss's own gradient: theta goes to the data's mean and stays."""
    data = GaussianMixture(torch.tensor([[0.8, -0.4]]), torch.tensor([0.5]), torch.zeros(1))
    theta = nn.Parameter(torch.zeros(2))
    dmd = matching(
        lambda x_t, t, _: data.denoise(x_t, *VP(t)),
        lambda x_t, t, _: GaussianMixture(theta.detach()[None], data.stds, torch.zeros(1)).denoise(x_t, *VP(t)),
        VP,
    )
    optimizer, generator = torch.optim.SGD([theta], lr=0.5), rng()
    for _ in range(60):
        z = torch.randn(256, 2, generator=generator)
        loss, _ = dmd.generator_loss(theta + 0.5 * z, NOTHING, OneStream(generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(theta.detach(), data.means[0].float(), rtol=0, atol=0.02)


# ---------------------------------------------------------------------------- who is asked what, and who learns


def test_guidance_is_the_real_scores_alone() -> None:
    """One call for each score; the teacher's has both branches in one batch, unconditional first."""
    teacher, fake = Spy(Affine(0)), Spy(Affine(2))
    condition, unconditional = torch.ones(8, 1), torch.full((1, 1), -2.0)
    x0 = normal(0)
    _, plain = matching(Affine(0), fake, VP).generator_loss(x0, condition, draws())
    dmd = matching(GuidedDenoiser(teacher, unconditional, 3.0), fake, VP)
    _, guided = dmd.generator_loss(x0, condition, draws())
    assert torch.equal(guided.x0_fake, plain.x0_fake)
    (x_t, t, conditions), *more = teacher.calls
    assert not more
    assert len(fake.calls) == 2  # one for each of the two losses above
    assert all(torch.equal(half, fake.calls[1][0]) for half in x_t.chunk(2))
    assert torch.equal(conditions, torch.cat([unconditional.expand(8, 1), condition]))
    without = Affine(0)(x_t[:8], t[:8], unconditional.expand(8, 1))
    torch.testing.assert_close(guided.x0_real, (without + 3 * (plain.x0_real - without)).detach())
    assert not torch.equal(guided.gradient, plain.gradient)


def test_each_loss_teaches_its_own_network_only() -> None:
    student, teacher, fake = Affine(0), Affine(2), Affine(4)
    dmd = matching(Denoiser(teacher, VP, "eps"), Denoiser(fake, VP, "eps"), VP)
    generator = OneStepGenerator(Denoiser(student, VP, "eps"), VP, torch.tensor(999))

    def learners(loss: Tensor) -> list[nn.Module]:
        for network in (student, teacher, fake):
            network.zero_grad(set_to_none=True)
        loss.backward()
        return [n for n in (student, teacher, fake) if any(p.grad is not None for p in n.parameters())]

    x0 = generator(normal(0), NOTHING)
    assert learners(dmd.critic_loss(x0, NOTHING, draws())) == [fake]
    loss, comparison = dmd.generator_loss(x0, NOTHING, draws())
    assert learners(loss) == [student]
    # Nor is a graph kept that nobody will walk back.
    assert not any(t.requires_grad for t in (comparison.gradient, comparison.x0_real, comparison.x0_fake))


def test_both_scores_see_the_same() -> None:
    real, fake, condition = Spy(Affine(0)), Spy(Affine(2)), normal(1, (8, 1))
    matching(real, fake, VP).generator_loss(normal(0), condition, draws())
    assert all(torch.equal(a, b) for a, b in zip(real.calls[0], fake.calls[0], strict=True))
    assert torch.equal(fake.calls[0][2], condition)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
@pytest.mark.parametrize("loss", ["generator_loss", "critic_loss"])
def test_samples_are_noised_with_unit_gaussian_noise_at_the_time_told(schedule: NoiseSchedule, loss: str) -> None:
    spy, x0 = Spy(constant(0)), normal(0, (500, 3, 4, 4))
    getattr(matching(spy, spy, schedule), loss)(x0, NOTHING, draws())
    x_t, t, _ = spy.calls[0]
    alpha, sigma = (append_dims(c.double(), 4) for c in schedule(t))
    keep = sigma.flatten() > 0.01  # below, what is left of eps in x_t is its rounding
    eps = ((x_t.double() - alpha * x0) / sigma)[keep]
    assert eps.mean().item() == pytest.approx(0, abs=5 / eps.numel() ** 0.5)
    assert eps.std().item() == pytest.approx(1, abs=5 / eps.numel() ** 0.5)
    assert abs((eps * x0[keep]).mean().item()) < 5 / eps.numel() ** 0.5


# ----------------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize(
    ("t_min", "t_max", "first", "last"), [(0.02, 0.98, 20, 980), (0, 1, 0, 999), (0.02, 0.5, 20, 500)]
)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
def test_times_of_distribution_matching(
    schedule: NoiseSchedule, t_min: float, t_max: float, first: int, last: int
) -> None:
    """Uniform over first .. last, both included; every one of them within 30,000 draws."""
    spy = Spy(constant(0))
    dmd = matching(spy, spy, schedule, t_min=t_min, t_max=t_max)
    _, comparison = dmd.generator_loss(torch.zeros(30_000, 1), NOTHING, draws())
    assert comparison.time.unique().tolist() == list(range(first, last + 1))
    assert torch.equal(spy.calls[0][1], schedule.training_times()[comparison.time])
    counts = comparison.time.bincount()[first:].double()
    expected = 30_000 / len(counts)
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum().item() == pytest.approx(freedom, abs=5 * (2 * freedom) ** 0.5)


def test_a_generators_state_decides_everything() -> None:
    dmd, x0 = matching(Affine(0), Affine(2), VP), normal(0)
    (first, a), (again, b), (other, c) = (dmd.generator_loss(x0, NOTHING, draws(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert torch.equal(a.gradient, b.gradient)
    assert not torch.equal(a.time, c.time)
    assert first != other


# ------------------------------------------------------------------------------------- precision and accidents


def test_the_difference_is_float32_when_the_networks_are_bfloat16() -> None:
    """Two eps that bfloat16 can just tell apart, where eps -> x0 multiplies them by 11: nothing else is rounded."""
    real_eps, fake_eps = torch.tensor(0.5).bfloat16(), torch.tensor(0.5 + 2**-8).bfloat16()
    spy = Spy(Denoiser(constant(real_eps), VP, "eps"))
    dmd = matching(spy, Denoiser(constant(fake_eps), VP, "eps"), VP, **at_one_time(1000, 950))
    x0 = normal(0)
    with torch.autocast("cpu", torch.bfloat16):  # even if all of it were inside
        loss, comparison = dmd.generator_loss(x0, NOTHING, draws())
    assert {t.dtype for t in (loss, comparison.gradient, comparison.x0_real, comparison.x0_fake)} == {torch.float32}
    x_t, t, _ = spy.calls[0]
    alpha, sigma = (append_dims(c.double(), 4) for c in VP(t))
    mu_real, mu_fake = ((x_t.double() - sigma * eps.double()) / alpha for eps in (real_eps, fake_eps))
    expected = (mu_fake - mu_real) / (x0 - mu_real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(comparison.gradient.double(), expected, rtol=2e-4, atol=0)


def broken(denoise: Network, samples: dict[int, float]) -> Network:
    """A denoiser that says something not finite, in one element, of some samples."""

    def call(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        x0 = denoise(x_t, t, condition).clone()
        for number, value in samples.items():
            x0[number, 1, 2, 3] = value
        return x0

    return call


def test_samples_that_are_not_finite_are_marked_and_teach_nothing() -> None:
    real, fake = Affine(0), Affine(2)
    x0 = normal(0)
    _, whole = matching(real, fake, VP).generator_loss(x0, NOTHING, draws())
    x0[0, 0, 0, 0] = math.nan
    x0[1, 2, 3, 3] = math.inf
    x0.requires_grad_()
    dmd = matching(broken(real, {2: math.nan, 3: math.inf}), broken(fake, {4: math.nan, 5: -math.inf}), VP)
    loss, comparison = dmd.generator_loss(x0, NOTHING, draws())
    loss.backward()
    assert comparison.is_finite.tolist() == [False] * 6 + [True] * 2
    assert x0.grad is not None
    for gradient in (comparison.gradient, x0.grad):
        assert gradient[:6].eq(0).all()
    # The others learn what they would have learnt: the mean is still over all samples.
    torch.testing.assert_close(comparison.gradient[6:], whole.gradient[6:])
    torch.testing.assert_close(x0.grad[6:], whole.gradient[6:] / math.prod(SHAPE))
    torch.testing.assert_close(loss.detach(), whole.gradient[6:].square().sum() / math.prod(SHAPE) / 2)


def test_a_sample_that_is_infinite_is_marked_even_if_the_scores_make_something_of_it() -> None:
    x0 = normal(0)
    x0[3] = math.inf
    loss, comparison = matching(constant(0.3), constant(-0.3), VP).generator_loss(x0, NOTHING, draws())
    assert comparison.is_finite.tolist() == [number != 3 for number in range(8)]
    assert loss.isfinite()
