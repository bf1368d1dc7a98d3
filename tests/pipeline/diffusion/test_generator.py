"""The student's map from noise to sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.diffusion.mixture import GaussianMixture
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, VPSchedule

SD = {"beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}


def recording(seen):
    def network(x_t, t, condition):
        seen.append((x_t, t, condition))
        return torch.zeros_like(x_t)

    return network


@pytest.mark.parametrize("t", [399, 999])
def test_on_a_vp_schedule_the_network_sees_the_noise_itself(t):
    seen = []
    schedule = VPSchedule.from_diffusers(SD)
    z = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    x0 = OneStepGenerator(Denoiser(recording(seen), schedule, "eps"), schedule, torch.tensor(t))(z, torch.ones(3, 1))
    x_t, times, _ = seen[0]
    assert torch.equal(x_t, z)
    assert times.tolist() == [t] * 3
    # eps = 0 means that all of x_t is signal
    torch.testing.assert_close(x0, z / schedule(torch.tensor(t))[0])


def test_on_the_edm_schedule_the_noise_is_scaled_to_its_level():
    seen = []
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    OneStepGenerator(Denoiser(recording(seen), EDMSchedule(), "x0"), EDMSchedule(), torch.tensor(80.0))(
        z, torch.ones(2, 1)
    )
    assert torch.equal(seen[0][0], 80 * z)


@given(mean=st.floats(-2, 2), std=st.floats(0.1, 2), sigma=st.floats(1, 100))
def test_a_perfect_teacher_answers_with_the_posterior_mean(mean, std, sigma):
    # One Gaussian: E[x0 | x_t] = (std^2 x_t + sigma^2 mean) / (std^2 + sigma^2), and x_t = sigma z.
    mixture = GaussianMixture(torch.tensor([[mean]]), torch.tensor([std]), torch.zeros(1))
    z = torch.linspace(-3, 3, 7)[:, None]
    schedule = EDMSchedule()
    generator = OneStepGenerator(mixture.as_denoiser(schedule), schedule, torch.tensor(sigma))
    expected = (std**2 * sigma * z + sigma**2 * mean) / (std**2 + sigma**2)
    torch.testing.assert_close(generator(z, torch.zeros(7, 1)), expected, rtol=1e-4, atol=1e-5)


def test_training_times_have_noise_increasing():
    for schedule, count in ((EDMSchedule(), 1000), (FlowSchedule(), 1000), (VPSchedule.from_diffusers(SD), 1000)):
        times = schedule.training_times()
        alpha, sigma = schedule(times)
        assert len(times) == count
        assert ((sigma / alpha).diff() > 0).all()
    edm = EDMSchedule().training_times()
    assert (edm[0].item(), edm[-1].item()) == (pytest.approx(0.002), 80.0)
    # Halfway between the ends in sigma^(1/7), as the grid is even in it.
    middle = edm[[499, 500]].double().pow(1 / 7).mean()
    assert middle.item() == pytest.approx((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2, rel=1e-6)
