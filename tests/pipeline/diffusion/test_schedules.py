import hashlib
import struct

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from hypothesis import given
from hypothesis import strategies as st

from pipeline.diffusion.schedules import EDMSchedule, FlowSchedule, NoiseSchedule, VPSchedule, karras_sigmas

BETA_SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"]
STABLE_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
}


def vp(**changes: object) -> VPSchedule:
    return VPSchedule.from_diffusers(STABLE_DIFFUSION | changes)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(("steps", "start", "end"), [(1000, 1e-4, 0.02), (1000, 0.00085, 0.012), (100, 0.001, 0.2)])
def test_vp_table_is_diffusers_table_to_the_last_bit(
    beta_schedule: str, zero_snr: bool, steps: int, start: float, end: float
) -> None:
    scheduler = DDPMScheduler(
        num_train_timesteps=steps,
        beta_schedule=beta_schedule,
        beta_start=start,
        beta_end=end,
        rescale_betas_zero_snr=zero_snr,
    )
    schedule = VPSchedule.from_diffusers(scheduler.config)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert (schedule.alphas_cumprod[-1] == 0) == zero_snr


def test_trained_betas_replace_the_beta_schedule() -> None:
    betas = torch.linspace(0.001, 0.3, 50).tolist()
    scheduler = DDPMScheduler(trained_betas=betas)
    schedule = VPSchedule.from_diffusers(scheduler.config)
    assert torch.equal(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert VPSchedule.from_diffusers({"trained_betas": betas}).description == schedule.description
    assert VPSchedule.from_diffusers({"trained_betas": [*betas[:-1], 0.31]}).description != schedule.description


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, PNDMScheduler])
def test_any_scheduler_of_the_family_gives_its_own_table(scheduler_class: type) -> None:
    scheduler = scheduler_class(**STABLE_DIFFUSION)
    assert torch.equal(VPSchedule.from_diffusers(scheduler.config).alphas_cumprod, scheduler.alphas_cumprod)


def test_descriptions() -> None:
    assert vp().description == "vp:scaled_linear:0.00085:0.012:1000"
    assert vp(rescale_betas_zero_snr=True).description == "vp:scaled_linear:0.00085:0.012:1000:zero_snr"
    assert vp(beta_schedule="squaredcos_cap_v2").description == "vp:squaredcos_cap_v2:1000"
    digest = hashlib.sha256(struct.pack("<2f", 0.5, 0.25)).hexdigest()
    assert vp(trained_betas=[0.5, 0.25]).description == f"vp:trained:{digest[:12]}:2"
    assert EDMSchedule().description == "edm"
    assert FlowSchedule().description == "flow"


def test_a_config_that_is_no_vp_schedule_is_refused_by_the_name_of_the_entry() -> None:
    with pytest.raises(ValueError, match="no beta_schedule"):
        VPSchedule.from_diffusers({"num_train_timesteps": 1000, "shift": 3.0})
    with pytest.raises(ValueError, match="no beta_end"):
        VPSchedule.from_diffusers({k: v for k, v in STABLE_DIFFUSION.items() if k != "beta_end"})
    with pytest.raises(ValueError, match="'exponential' is unknown"):
        vp(beta_schedule="exponential")


def test_vp_looks_up_the_published_last_level_of_stable_diffusion() -> None:
    alpha, sigma = vp()(torch.tensor(999))
    assert alpha.item() ** 2 == pytest.approx(0.0047, abs=5e-5)
    assert sigma.item() / alpha.item() == pytest.approx(14.6, abs=0.05)


@pytest.mark.parametrize("t", [-1, 1000])
def test_vp_refuses_timesteps_outside_of_the_table(t: int) -> None:
    with pytest.raises(IndexError):
        vp()(torch.tensor([t]))


def test_vp_refuses_fractional_timesteps() -> None:
    with pytest.raises(RuntimeError, match="int32 or int64"):
        vp()(torch.tensor(3.5))


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        *[(vp(beta_schedule=name), torch.arange(1000)) for name in BETA_SCHEDULES],
        *[(vp(beta_schedule=name, rescale_betas_zero_snr=True), torch.arange(1000)) for name in BETA_SCHEDULES],
        (EDMSchedule(), torch.logspace(-3, 2, 300)),
        (FlowSchedule(), torch.linspace(0.001, 1, 300)),
    ],
    ids=lambda value: getattr(value, "description", ""),
)
def test_signal_to_noise_ratio_decreases_strictly(schedule: NoiseSchedule, t: torch.Tensor) -> None:
    alpha, sigma = (coefficient.double() for coefficient in schedule(t))
    assert ((alpha / sigma).diff() < 0).all()
    assert (sigma > 0).all()
    assert (alpha >= 0).all()


@pytest.mark.parametrize(
    ("schedule", "relation"),
    [
        (vp(), lambda alpha, sigma: alpha**2 + sigma**2),
        (vp(rescale_betas_zero_snr=True), lambda alpha, sigma: alpha**2 + sigma**2),
        (EDMSchedule(), lambda alpha, sigma: alpha),
        (FlowSchedule(), lambda alpha, sigma: alpha + sigma),
    ],
    ids=["vp", "vp zero snr", "edm", "flow"],
)
def test_each_family_keeps_its_relation(schedule: NoiseSchedule, relation: object) -> None:
    t = torch.arange(1000) if isinstance(schedule, VPSchedule) else torch.linspace(0.001, 1, 300)
    torch.testing.assert_close(relation(*schedule(t)), torch.ones(len(t)), rtol=0, atol=2e-7)


@pytest.mark.parametrize("schedule", [vp(), EDMSchedule(), FlowSchedule()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_coefficients_are_float32_in_the_shape_of_t(schedule: NoiseSchedule, shape: tuple[int, ...]) -> None:
    t = torch.ones(shape, dtype=torch.int64 if isinstance(schedule, VPSchedule) else torch.float64)
    for coefficient in schedule(t):
        assert coefficient.dtype == torch.float32
        assert coefficient.shape == shape


def test_karras_grid_of_18_steps() -> None:
    """The grid of EDM's CIFAR-10 results, from Eq. 5 with plain floats."""
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    sigmas = karras_sigmas(18, sigma_min=0.002, sigma_max=80, rho=7)
    assert sigmas.dtype == torch.float64
    assert sigmas.tolist() == pytest.approx([*expected, 0.0], rel=1e-12)
    rounded = [80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.4009, 5.3152, 3.2568, 1.9233, 1.0882, 0.58535, 0.29644]
    rounded += [0.13952, 0.059947, 0.022935, 0.0075280, 0.002, 0]
    assert sigmas.tolist() == pytest.approx(rounded, rel=5e-5)


@given(
    steps=st.integers(2, 300),
    sigma_min=st.floats(1e-4, 0.9),
    sigma_max=st.floats(1, 1000),
    rho=st.floats(1, 10),
)
def test_karras_grid_is_even_in_the_rhoth_root(steps: int, sigma_min: float, sigma_max: float, rho: float) -> None:
    sigmas = karras_sigmas(steps, sigma_min, sigma_max, rho)
    assert sigmas.shape == (steps + 1,)
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (sigma_max, sigma_min, 0)
    gaps = (sigmas[:-1] ** (1 / rho)).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(steps - 1), rtol=1e-8, atol=1e-12)


def test_karras_grid_of_one_step_is_the_largest_level() -> None:
    assert karras_sigmas(1, 0.002, 80, 7).tolist() == [80, 0]


def test_karras_grid_with_rho_one_is_even() -> None:
    assert karras_sigmas(4, 1, 4, 1).tolist() == pytest.approx([4, 3, 2, 1, 0])
