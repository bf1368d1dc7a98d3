import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.guidance import GuidedDenoiser
from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.samplers import ddim, edm_heun
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, karras_sigmas

NOTHING = torch.zeros(1)
"""The condition of a denoiser that has none."""

STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


class Counter:
    """Counts the evaluations of a denoiser and keeps the times and dtypes that it saw."""

    def __init__(self, denoiser: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self.denoiser = denoiser
        self.times: list[float] = []

    def __call__(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert x_t.dtype == torch.float32
        assert t.shape == (len(x_t),)
        assert t.dtype in (torch.float32, torch.int64)
        self.times.append(t[0].item())
        return self.denoiser(x_t, t, condition)


def random_noise(step: int, shape: tuple[int, ...] = (6, 5)) -> Tensor:
    """Churn noise as a function of the step alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step))


# ------------------------------------------------------------------------------------------ the exact solution


def errors(sampler: Callable[[Tensor, Tensor], Tensor], gaussian: object, generator: torch.Generator) -> list[float]:
    """Largest error at sigma_min for 32, 64, 128 and 256 steps, against the exact solution of the ODE."""
    noise = torch.randn(8, 3, generator=generator)
    result: list[float] = []
    for steps in (32, 64, 128, 256):
        sigmas = karras_sigmas(steps + 1, 0.02, 20.0, 7.0)[:-1]
        exact = gaussian.solution(noise.double() * 20.0, 20.0, 0.02)
        result.append((sampler(noise, sigmas).double() - exact).abs().max().item())
    return result


def test_heun_converges_at_second_order(gaussian: object, generator: torch.Generator) -> None:
    found = errors(lambda noise, sigmas: edm_heun(gaussian.denoiser, noise, NOTHING, sigmas), gaussian, generator)
    for coarse, fine in pairwise(found):
        assert coarse / fine == pytest.approx(4, rel=0.15)
    assert found[-1] < 2e-4


def test_ddim_converges_at_first_order(gaussian: object, generator: torch.Generator) -> None:
    def euler(noise: Tensor, sigmas: Tensor) -> Tensor:
        states: list[Tensor] = []
        ddim(gaussian.denoiser, EDMSchedule(), noise * sigmas[0], sigmas, NOTHING, record=states.append)
        return states[-2]  # At sigma_min, before the last jump to x0.

    found = errors(euler, gaussian, generator)
    for coarse, fine in pairwise(found):
        assert coarse / fine == pytest.approx(2, rel=0.15)
    assert found[-1] < 3e-2


@pytest.mark.parametrize("std", [0.05, 0.5, 2.0])
def test_heun_on_the_published_grid_ends_at_the_exact_sample(std: float, generator: torch.Generator) -> None:
    """The whole way from sigma 80 to 0: noise n ends at mean + (80 n - mean) s / sqrt(s^2 + 80^2)."""
    mixture = GaussianMixture(torch.full((1, 3), 0.3), torch.tensor([std]), torch.zeros(1))
    noise = torch.randn(8, 3, generator=generator)
    sigmas = karras_sigmas(200, 0.002, 80, 7)
    x0 = edm_heun(mixture.as_denoiser(EDMSchedule()), noise, torch.zeros(8, 1), sigmas)
    exact = 0.3 + (80 * noise.double() - 0.3) * std / math.hypot(std, 80)
    torch.testing.assert_close(x0.double(), exact, rtol=0, atol=2e-3 * std)


@pytest.mark.parametrize(
    ("schedule", "timesteps"),
    [
        (VPSchedule.from_diffusers(STABLE_DIFFUSION), torch.arange(999, -1, -1)),
        (EDMSchedule(), karras_sigmas(1000, 0.002, 80, 7)[:-1]),
        (FlowSchedule(), torch.linspace(1, 0.001, 1000)),
    ],
    ids=["vp", "edm", "flow"],
)
def test_ddim_follows_the_ode_of_every_schedule(
    schedule: NoiseSchedule, timesteps: Tensor, generator: torch.Generator
) -> None:
    """x_t / alpha obeys the EDM equation in sigma / alpha: the std of the path is sqrt(alpha^2 s^2 + sigma^2)."""
    std = 0.5
    mixture = GaussianMixture(torch.full((1, 3), 0.3), torch.tensor([std]), torch.zeros(1))
    alpha, sigma = (coefficient[0].double() for coefficient in schedule(timesteps))
    noise = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    x_T = alpha * 0.3 + torch.sqrt(alpha**2 * std**2 + sigma**2) * noise
    x0 = ddim(mixture.as_denoiser(schedule), schedule, x_T.float(), timesteps, torch.zeros(8, 1))
    exact = 0.3 + (x_T - alpha * 0.3) * std / torch.sqrt(alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(x0.double(), exact, rtol=0, atol=1e-2)


# -------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(
    ("prediction_type", "parametrization", "changes"),
    [
        ("epsilon", "eps", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("epsilon", "eps", {"timestep_spacing": "trailing"}),
        ("sample", "x0", {"timestep_spacing": "leading"}),
        ("v_prediction", "v", {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}),
    ],
)
def test_ddim_is_diffusers_ddim(
    steps: int, prediction_type: str, parametrization: str, changes: dict[str, object], generator: torch.Generator
) -> None:
    def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return torch.sin(2 * x_t + t.view(-1, 1, 1, 1) / 300) + condition * x_t.flip(-1)

    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=True, **changes
    )
    scheduler.set_timesteps(steps)
    x_T = torch.randn(3, 2, 4, 4, generator=generator)
    condition = torch.rand(3, 1, 1, 1, generator=generator)

    expected = x_T.double()
    for t in scheduler.timesteps:
        prediction = network(expected.float(), t.expand(3), condition)
        expected = scheduler.step(prediction.double(), t, expected).prev_sample

    schedule = VPSchedule.from_diffusers(scheduler.config)
    x0 = ddim(Denoiser(network, schedule, parametrization), schedule, x_T, scheduler.timesteps, condition)
    torch.testing.assert_close(x0, expected.float(), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- EDM Algorithm 2


def algorithm_2(
    D: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    t: list[float],
    S_churn: float,
    S_tmin: float,
    S_tmax: float,
    S_noise: float,
) -> Tensor:
    """Karras et al. 2022, Algorithm 2, line by line."""
    N = len(t) - 1
    x = noise.double() * t[0]
    for i in range(N):
        gamma = min(S_churn / N, 2**0.5 - 1) if S_tmin <= t[i] <= S_tmax else 0.0
        epsilon = random_noise(i).double() * S_noise
        t_hat = t[i] + gamma * t[i]
        x_hat = x + (t_hat**2 - t[i] ** 2) ** 0.5 * epsilon
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - D(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * d_prime)
    return x


@pytest.mark.parametrize(
    ("s_churn", "s_min", "s_max", "s_noise"),
    [(0, 0, math.inf, 1), (40, 0.05, 50, 1.003), (5, 0, math.inf, 1), (1e3, 0, 80, 0.9), (40, 0, 0.001, 1)],
)
def test_heun_is_algorithm_2(
    gaussian: object, generator: torch.Generator, s_churn: float, s_min: float, s_max: float, s_noise: float
) -> None:
    def nonlinear(x: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        return gaussian.denoiser(x, sigma, condition) + 0.1 * torch.sin(3 * x.double())

    noise = torch.randn(6, 5, generator=generator)
    sigmas = karras_sigmas(18, 0.002, 80, 7)
    expected = algorithm_2(
        lambda x, t: nonlinear(x, torch.tensor([t]), NOTHING), noise, sigmas.tolist(), s_churn, s_min, s_max, s_noise
    )
    x0 = edm_heun(
        nonlinear,
        noise,
        NOTHING,
        sigmas,
        s_churn=s_churn,
        s_min=s_min,
        s_max=s_max,
        s_noise=s_noise,
        churn_noise=random_noise,
    )
    torch.testing.assert_close(x0.double(), expected, rtol=1e-5, atol=1e-5)


def test_churn_asks_for_noise_only_where_it_adds_some(gaussian: object, generator: torch.Generator) -> None:
    asked: list[int] = []

    def churn_noise(step: int) -> Tensor:
        asked.append(step)
        return random_noise(step)

    noise, sigmas = torch.randn(6, 5, generator=generator), karras_sigmas(18, 0.002, 80, 7)
    edm_heun(gaussian.denoiser, noise, NOTHING, sigmas, churn_noise=churn_noise)
    assert asked == []
    edm_heun(gaussian.denoiser, noise, NOTHING, sigmas, s_churn=40, s_min=0.05, s_max=50, churn_noise=churn_noise)
    assert asked == [step for step in range(18) if 0.05 <= sigmas[step] <= 50]


def test_churn_without_noise_is_refused(gaussian: object) -> None:
    with pytest.raises(ValueError, match="churn_noise"):
        edm_heun(gaussian.denoiser, torch.zeros(1, 1), NOTHING, karras_sigmas(4, 0.1, 1, 7), s_churn=1)


def test_churn_keeps_the_distribution(gaussian: object, generator: torch.Generator) -> None:
    """Noise in, noise out: replacing noise at every level leaves the data distribution as it is, mean and variance.

    The largest churn replaces everything: the result has forgotten the noise that it started from.
    """
    shape = (200, 200)
    noise = torch.randn(shape, generator=generator)
    x0 = edm_heun(
        gaussian.denoiser,
        noise,
        NOTHING,
        karras_sigmas(100, 0.002, 80, 7),
        s_churn=math.inf,
        churn_noise=lambda step: random_noise(step, shape),
    ).double()
    assert x0.mean().item() == pytest.approx(gaussian.mean, abs=0.01)
    assert x0.std().item() == pytest.approx(gaussian.std, rel=0.02)
    correlation = torch.corrcoef(torch.stack([noise.double().flatten(), x0.flatten()]))[0, 1]
    assert abs(correlation.item()) < 0.03


# ------------------------------------------------------------------------------- evaluations, trajectory, dtypes


def test_evaluations(gaussian: object, generator: torch.Generator) -> None:
    """35 evaluations for 18 steps, as published; the times are the levels, each inner one visited twice."""
    noise, sigmas = torch.randn(2, 3, generator=generator), karras_sigmas(18, 0.002, 80, 7)
    heun, euler = Counter(gaussian.denoiser), Counter(gaussian.denoiser)
    edm_heun(heun, noise, NOTHING, sigmas)
    ddim(euler, EDMSchedule(), noise * 80, sigmas[:-1], NOTHING)
    levels = sigmas[:-1].float().tolist()
    assert heun.times == [levels[0], *[level for level in levels[1:] for _ in range(2)]]
    assert len(heun.times) == 35
    assert euler.times == levels


def test_ddim_on_edm_is_eulers_method(gaussian: object, generator: torch.Generator) -> None:
    noise, sigmas = torch.randn(4, 3, generator=generator), karras_sigmas(12, 0.002, 80, 7)
    x = noise.double() * 80
    for sigma, sigma_next in zip(sigmas.float().double(), sigmas[1:].float().double(), strict=False):
        x = x + (sigma_next - sigma) * (x - gaussian.denoiser(x, sigma[None], NOTHING)) / sigma
    x0 = ddim(gaussian.denoiser, EDMSchedule(), noise * 80, sigmas[:-1], NOTHING)
    torch.testing.assert_close(x0.double(), x, rtol=1e-6, atol=1e-6)


def test_trajectories_start_at_the_noise_and_end_at_x0(gaussian: object, generator: torch.Generator) -> None:
    """Along the way the state at each level is the exact one, up to the order of the method."""
    noise, sigmas = torch.randn(4, 2, 3, generator=generator), karras_sigmas(300, 0.002, 80, 7)
    exact = torch.stack([gaussian.solution(noise.double() * 80, 80, sigma) for sigma in sigmas.tolist()])
    heun_states: list[Tensor] = []
    euler_states: list[Tensor] = []
    heun = edm_heun(gaussian.denoiser, noise, NOTHING, sigmas, record=heun_states.append)
    euler = ddim(gaussian.denoiser, EDMSchedule(), noise * 80, sigmas[:-1], NOTHING, record=euler_states.append)
    for x0, recorded, tolerance in ((heun, heun_states, 1e-3), (euler, euler_states, 5e-2)):
        states = torch.stack(recorded)
        assert states.shape == (301, 4, 2, 3)
        assert states.dtype == x0.dtype == torch.float32
        assert torch.equal(states[0], noise * 80)
        assert torch.equal(states[-1], x0)
        relative = (states.double() - exact) / torch.sqrt(sigmas**2 + gaussian.std**2)[:, None, None, None]
        assert relative.abs().max() < tolerance
    assert torch.equal(heun, edm_heun(gaussian.denoiser, noise, NOTHING, sigmas))
    assert torch.equal(euler, ddim(gaussian.denoiser, EDMSchedule(), noise * 80, sigmas[:-1], NOTHING))


def test_the_state_is_float64(generator: torch.Generator) -> None:
    """With a constant denoiser every path is a straight line: after a thousand steps only the last rounding is left.

    A float32 state would be a dozen roundings away by then.
    """
    one_rounding = {"rtol": 2**-24, "atol": 1e-11}
    noise, clean = torch.randn(2, 64, 64, generator=generator)
    sigmas = karras_sigmas(1000, 0.002, 80, 7)[:-1]
    x = edm_heun(lambda x, t, c: clean, noise, NOTHING, sigmas)
    exact = clean.double() + (80 * noise.double() - clean.double()) * 0.002 / 80
    torch.testing.assert_close(x.double(), exact, **one_rounding)

    schedule = VPSchedule.from_diffusers(STABLE_DIFFUSION)
    timesteps = torch.arange(999, -1, -1)
    states: list[Tensor] = []
    ddim(lambda x, t, c: clean, schedule, noise, timesteps, NOTHING, record=states.append)
    alpha, sigma = (coefficient.double() for coefficient in schedule(timesteps))
    eps = (noise.double() - alpha[0] * clean) / sigma[0]
    exact = alpha[-1] * clean.double() + sigma[-1] * eps
    torch.testing.assert_close(states[-2].double(), exact, **one_rounding)


def test_samplers_take_a_guided_denoiser(generator: torch.Generator) -> None:
    """Guidance between two Gaussians of one width is a Gaussian again, with mean m_u + w (m_c - m_u): exact answer."""
    mixture = GaussianMixture(torch.tensor([[0.0], [1.0]]), torch.tensor([0.5, 0.5]), torch.zeros(2))
    conditional = torch.tensor([[-math.inf, 0.0]]).expand(8, 2)
    unconditional = torch.tensor([[0.0, -math.inf]])
    noise = torch.randn(8, 1, generator=generator)
    denoiser = GuidedDenoiser(mixture.as_denoiser(EDMSchedule()), unconditional, 3.0)
    x0 = edm_heun(denoiser, noise, conditional, karras_sigmas(200, 0.002, 80, 7))
    exact = 3.0 + (80 * noise - 3.0) * 0.5 / math.hypot(0.5, 80)
    torch.testing.assert_close(x0, exact, rtol=0, atol=1e-3)


def test_samples_do_not_depend_on_their_batch(generator: torch.Generator) -> None:
    means = torch.randn(5, 3, generator=generator)
    mixture = GaussianMixture(means, torch.full((5,), 0.2), torch.zeros(5))
    denoiser, sigmas = mixture.as_denoiser(EDMSchedule()), karras_sigmas(18, 0.002, 80, 7)
    noise, condition = torch.randn(6, 3, generator=generator), torch.randn(6, 5, generator=generator)
    together = edm_heun(denoiser, noise, condition, sigmas)
    alone = torch.cat([edm_heun(denoiser, noise[i, None], condition[i, None], sigmas) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
