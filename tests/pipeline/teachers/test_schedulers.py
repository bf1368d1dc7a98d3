from typing import Any

import diffusers
import pytest
import torch
from support.tiny_sd import SCHEDULER
from torch import Tensor

from configs.errors import UserError
from configs.schema import DiffusersSampler
from pipeline.diffusion.schedules import VPSchedule
from pipeline.teachers.schedulers import (
    SUITABLE,
    SchedulerLoop,
    check_sampler,
    make_scheduler,
    sample_generators,
)

OWN = SCHEDULER | {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}
SHAPE = (4, 4, 4)
INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(hasattr(getattr(diffusers, name), "_backends"), reason="needs scipy"))
    for name in SUITABLE
]


def sampler(name: str, steps: int = 6, **options: Any) -> DiffusersSampler:
    return DiffusersSampler(scheduler=name, steps=steps, options=options)


def network(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x_t) * (1 + t.float() / 1000)


def noise(count: int) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def check(settings: DiffusersSampler, own: dict[str, Any] = OWN) -> None:
    check_sampler(settings, own, VPSchedule.from_diffusers(own))


@pytest.mark.parametrize("name", INSTALLED)
def test_a_sample_does_not_depend_on_its_batch_nor_on_global_randomness(name: str) -> None:
    z, ids = noise(5), [3, 1, 4, 15, 9]
    settings = sampler(name)
    check(settings)
    loop = SchedulerLoop(settings, OWN)
    state = torch.random.get_rng_state()
    batch = loop(network, z, sample_generators(7, ids))
    torch.manual_seed(123)
    singles = [loop(network, z[i : i + 1], sample_generators(7, ids[i : i + 1])) for i in range(len(ids))]
    torch.testing.assert_close(torch.cat(singles), batch, rtol=1e-6, atol=1e-6 * batch.abs().max().item())
    torch.manual_seed(123)
    expected = torch.random.get_rng_state()
    loop(network, z, sample_generators(7, ids))
    assert torch.equal(torch.random.get_rng_state(), expected)
    torch.random.set_rng_state(state)


@pytest.mark.parametrize(
    "settings",
    [
        sampler("DDPMScheduler"),
        sampler("EulerAncestralDiscreteScheduler"),
        sampler("LCMScheduler"),
        sampler("DDIMScheduler", eta=1.0),
        sampler("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
        sampler("EulerDiscreteScheduler", s_churn=3.0),
    ],
    ids=lambda settings: settings.scheduler,
)
def test_added_noise_derives_from_seed_and_sample_id(settings: DiffusersSampler) -> None:
    z = noise(1).expand(3, -1, -1, -1)
    loop = SchedulerLoop(settings, OWN)
    same_noise = loop(network, z, sample_generators(7, [0, 1, 0]))
    assert torch.equal(same_noise[0], same_noise[2])
    assert not torch.allclose(same_noise[0], same_noise[1], atol=1e-2)
    other_seed = loop(network, z, sample_generators(8, [0, 1, 0]))
    assert not torch.allclose(same_noise, other_seed, atol=1e-2)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("steps", [1, 5])
def test_num_predictions_are_the_calls(name: str, steps: int) -> None:
    calls = 0

    def counting(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x_t, t)

    loop = SchedulerLoop(sampler(name, steps), OWN)
    loop(counting, noise(1), sample_generators(0, [0]))
    assert calls == loop.num_predictions


def test_num_predictions_of_pndm_and_heun() -> None:
    assert SchedulerLoop(sampler("PNDMScheduler", 50), OWN).num_predictions == 51
    assert SchedulerLoop(sampler("HeunDiscreteScheduler", 50), OWN).num_predictions == 99


def test_a_perfect_network_is_followed_to_the_data() -> None:
    """For one point as data, eps = (x_t - alpha m) / sigma, and DDIM ends at the point whatever the number of steps."""
    schedule, point = VPSchedule.from_diffusers(OWN), torch.full(SHAPE, 0.3)

    def perfect(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule(t)
        return (x_t - alpha * point) / sigma

    loop = SchedulerLoop(sampler("DDIMScheduler", 7, set_alpha_to_one=True), OWN)
    x0 = loop(perfect, noise(2), sample_generators(0, [0, 1]))
    torch.testing.assert_close(x0, point.expand(2, *SHAPE), rtol=0, atol=1e-4)


def test_starts_from_the_noise_at_the_first_level() -> None:
    seen: list[Tensor] = []

    def record(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return torch.zeros_like(x_t)

    z = noise(2)
    for name, options in [("PNDMScheduler", {}), ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})]:
        seen.clear()
        SchedulerLoop(sampler(name, 4, **options), OWN)(record, z, sample_generators(0, [0, 1]))
        # What the network sees is scaled to unit variance in either convention: sigma / sqrt(1 + sigma^2) is near 1.
        torch.testing.assert_close(seen[0], z, rtol=0.004, atol=0)


def test_own_config_is_the_start_and_nothing_is_clipped() -> None:
    scheduler = make_scheduler(sampler("DDIMScheduler"), {k: v for k, v in OWN.items() if k != "clip_sample"})
    assert scheduler.config.clip_sample is False
    assert (scheduler.config.set_alpha_to_one, scheduler.config.steps_offset) == (False, 1)
    assert make_scheduler(sampler("DDIMScheduler", steps_offset=0), OWN).config.steps_offset == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (sampler("EulerDiscreteSheduler"), r"scheduler: diffusers has no EulerDiscreteSheduler; did you mean Euler"),
        (sampler("UNet2DConditionModel"), r"diffusers has no UNet2DConditionModel"),
        (sampler("DPMSolverSDEScheduler"), r"DPMSolverSDEScheduler does not suit.*derived per sample"),
        (sampler("FlowMatchEulerDiscreteScheduler"), r"does not suit"),
        (sampler("DDIMScheduler", timestep_spacin="trailing"), r"no such option; did you mean timestep_spacing\?"),
        (sampler("PNDMScheduler", eta=0.5), r"options.eta: PNDMScheduler has no such option"),
        (sampler("DDIMScheduler", timestep_spacing="trailling"), r"DDIMScheduler with 6 steps: trailling"),
        (sampler("DDIMScheduler", prediction_type="v_prediction"), r"options.prediction_type: .*trained on"),
        (sampler("UniPCMultistepScheduler", use_flow_sigmas=True), r"options.use_flow_sigmas: .*trained on"),
        (sampler("DPMSolverMultistepScheduler", algorithm_type="sde"), r"sde is not implemented"),
        (sampler("DDIMScheduler", steps=1001), r"DDIMScheduler with 1001 steps: .*cannot be larger"),
        (sampler("DPMSolverMultistepScheduler", steps=1000), r"does not end in finite numbers"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.scheduler}-{value.options}",
)
def test_mistakes_are_found_before_anything_runs(settings: DiffusersSampler, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check(settings)
    assert str(error.value).startswith("spec.sampler")
    assert "\n" not in str(error.value)


def test_a_scheduler_that_ignores_the_teachers_schedule_is_refused() -> None:
    zero_snr = OWN | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    check(sampler("DDIMScheduler", timestep_spacing="trailing"), zero_snr)
    with pytest.raises(UserError, match=r"PNDMScheduler cannot follow .*zero_snr"):
        check(sampler("PNDMScheduler"), zero_snr)


def test_generators_are_those_of_the_documented_seed() -> None:
    (generator,) = sample_generators(0, [5])
    assert generator.initial_seed() == 0x5492D6908DC53FD6  # blake2b-64 of "0/5/scheduler", little-endian
