"""What the fake score is trained on, and what it learns."""

import pytest
import torch
from support.scores import NOTHING, SCHEDULES, VP, Affine, OneStream, Spy, constant, draws, matching, normal, rng
from torch import Tensor, nn

from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parametrization import append_dims
from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.description[:4])
def test_snr_weighting_is_the_error_in_eps(schedule: NoiseSchedule) -> None:
    spy = Spy(Denoiser(network := Affine(0), schedule, "eps"))
    x0 = normal(0)
    loss = matching(spy, spy, schedule, critic_weighting="snr").critic_loss(x0, NOTHING, draws())
    x_t, t, condition = spy.calls[0]
    alpha, sigma = (append_dims(c.double(), 4) for c in schedule(t))
    eps = (x_t.double() - alpha * x0) / sigma
    expected = (network(x_t, t, condition).double() - eps).square().mean()
    # At EDM's smallest level the recovered eps has the rounding of x_t over 0.002.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_edm_weighting_is_edms() -> None:
    spy, x0 = Spy(constant(0.3)), normal(0)
    loss = matching(spy, spy, EDMSchedule(), critic_weighting="edm").critic_loss(x0, NOTHING, draws())
    sigma = append_dims(spy.calls[0][1].double(), 4)
    expected = ((sigma**2 + 0.5**2) / (sigma * 0.5) ** 2 * (0.3 - x0).square()).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_the_schedule_chooses_the_weighting_unless_told() -> None:
    x0 = normal(0)

    def value(schedule: NoiseSchedule, **loss: object) -> float:
        return matching(constant(0), constant(0), schedule, **loss).critic_loss(x0, NOTHING, draws()).item()

    assert value(EDMSchedule()) == value(EDMSchedule(), critic_weighting="edm")
    assert value(VP) == value(VP, critic_weighting="snr")
    assert value(FlowSchedule()) == value(FlowSchedule(), critic_weighting="snr")
    assert value(EDMSchedule(), critic_weighting="x0") == pytest.approx(x0.square().mean().item(), rel=1e-5)
    assert len({value(EDMSchedule(), critic_weighting=name) for name in ("snr", "edm", "x0")}) == 3


@pytest.mark.parametrize("weighting", ["snr", "edm", "x0"])
def test_the_critic_learns_the_students_score(weighting: str) -> None:
    """Samples N(m, s^2): the best denoiser at every time is a line, and a line per time is what is trained."""
    mean, std = 0.4, 0.3
    schedule = VPSchedule(torch.tensor([0.95, 0.6, 0.1]), "three levels")
    slope, offset = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def line(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return slope[t, None] * x_t + offset[t, None]

    dmd = matching(line, line, schedule, critic_weighting=weighting)
    optimizer, generator = torch.optim.Adam([slope, offset], lr=0.05), rng()
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        x0 = mean + std * torch.randn(2048, 1, generator=generator)
        optimizer.zero_grad()
        dmd.critic_loss(x0, NOTHING, OneStream(generator)).backward()
        optimizer.step()
        decay.step()
    alpha, sigma = schedule(torch.arange(3))
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    torch.testing.assert_close(slope.detach(), gain, rtol=0, atol=0.01)
    torch.testing.assert_close(offset.detach(), mean * (1 - gain * alpha), rtol=0, atol=0.01)


def test_the_critic_is_asked_once_and_the_teacher_not_at_all() -> None:
    teacher, fake = Spy(Affine(0)), Spy(Affine(2))
    matching(teacher, fake, VP).critic_loss(normal(0), NOTHING, draws())
    assert len(fake.calls) == 1
    assert len(fake.calls[0][0]) == 8
    assert not teacher.calls


def test_times_of_the_critic_are_all_of_them() -> None:
    spy = Spy(constant(0))
    matching(spy, spy, VP).critic_loss(torch.zeros(30_000, 1), NOTHING, draws())
    t = spy.calls[0][1]
    assert t.dtype == torch.int64
    assert t.unique().tolist() == list(range(1000))
