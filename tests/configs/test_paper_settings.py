"""The configuration files that reproduce a paper have the paper's numbers (Yin et al. 2024, Appendix B and Table 5)."""

from functools import cache
from itertools import accumulate
from pathlib import Path

import pytest

import configs
from configs.load import parse
from configs.schema import GeneratePairsConfig
from configs.train_schema import TrainConfig

FOLDER = Path(configs.__file__).parent

COMMON = {"warmup_steps": 500, "betas": (0.9, 0.999), "weight_decay": 0.01, "max_grad_norm": 10.0}
"""Of the optimizer, in every training."""

TRAININGS = {
    # lr, lambda, batch of distribution matching, of pairs, steps, guidance, matching on pairs, largest time, precision
    "cifar10/train_cond.yaml": (5e-5, 0.25, 392, 392, 300_000, 1.0, False, 0.98, "float32"),
    "cifar10/train_uncond.yaml": (5e-5, 0.5, 392, 392, 300_000, 1.0, False, 0.98, "float32"),
    "imagenet64/train.yaml": (2e-6, 0.25, 336, 336, 350_000, 1.0, False, 0.98, "bfloat16"),
    "sd15/train.yaml": (1e-5, 0.25, 2304, 1152, 20_000, 3.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v01.yaml": (1e-5, 0.1, 2560, 1280, 5_400, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v02.yaml": (1e-5, 0.5, 2560, 1280, 3_200, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v03.yaml": (1e-5, 1.0, 2560, 1280, 12_500, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v04.yaml": (1e-5, 1.0, 2560, 1280, 35_200, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v05.yaml": (1e-5, 1.0, 2560, 1280, 3_800, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v06.yaml": (1e-5, 1.0, 2560, 1280, 7_900, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v07.yaml": (1e-5, 1.0, 2560, 1280, 6_000, 8.0, True, 0.98, "bfloat16"),
    "sd15/guidance8/v08.yaml": (1e-5, 1.0, 2560, 1280, 6_000, 8.0, True, 0.5, "bfloat16"),
    "sd15/guidance8/v09.yaml": (1e-5, 1.0, 1280, 320, 47_000, 8.0, True, 0.5, "bfloat16"),
    "sd15/guidance8/v10.yaml": (1e-5, 0.75, 1280, 320, 22_500, 8.0, True, 0.5, "bfloat16"),
    "sd15/guidance8/v11.yaml": (1e-5, 0.5, 1280, 320, 13_000, 8.0, True, 0.5, "bfloat16"),
    "sd15/guidance8/v12.yaml": (1e-5, 0.25, 1280, 320, 2_500, 8.0, True, 0.5, "bfloat16"),
}

PAIRS = {
    # pairs, sampler, its steps, guidance
    "cifar10/pairs_cond.yaml": (100_000, "edm_heun", 18, 1.0),
    "cifar10/pairs_uncond.yaml": (500_000, "edm_heun", 18, 1.0),
    "imagenet64/pairs.yaml": (25_000, "edm_heun", 256, 1.0),
    "sd15/pairs.yaml": (500_000, "PNDMScheduler", 50, 3.0),
    "sd15/guidance8/pairs.yaml": (12_000_000, "PNDMScheduler", 50, 8.0),
}


@cache
def training(name):
    argv = ["--config", str(FOLDER / name), "--output", "/runs/x", "--data.pairs", "/pairs"]
    if not name.startswith("sd15"):
        argv += ["--teacher.path", "/teacher"]
    return parse(TrainConfig, argv=argv)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_has_the_numbers_of_the_paper(name):
    config = training(name)
    loss, batch = config.loss, config.batch
    assert TRAININGS[name] == (
        config.optimizer.lr,
        loss.regression_weight,
        batch.dm,
        batch.pairs,
        config.runtime.steps,
        loss.guidance_scale,
        loss.dm_on_pairs,
        loss.t_max,
        config.precision,
    )
    assert {key: getattr(config.optimizer, key) for key in COMMON} == COMMON
    assert (loss.dm_weight, loss.t_min, loss.regression, loss.regression_space) == (1.0, 0.02, "lpips", "pixels")
    assert (loss.critic_steps_per_generator_step, loss.dm_gradient) == (1, "algorithm_2")
    assert config.optimizer.critic_lr is None  # that of the student


@pytest.mark.parametrize("name", TRAININGS)
def test_batches_divide_among_eight_devices(name):
    config = training(name)
    micro_batch = config.runtime.micro_batch
    accumulated, left = divmod(config.batch.dm, 8 * micro_batch)
    assert (left, config.batch.pairs % (8 * accumulated)) == (0, 0)


def test_the_phases_at_guidance_8_are_165_000_steps_one_after_the_other():
    steps = [training(f"sd15/guidance8/v{number:02d}.yaml").runtime.steps for number in range(1, 13)]
    until = list(accumulate(steps))
    assert until[:7] == [5_400, 8_600, 21_100, 56_300, 60_100, 68_000, 74_000]
    assert until[7:] == [80_000, 127_000, 149_500, 162_500, 165_000]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_the_numbers_of_the_paper(name):
    argv = ["--config", str(FOLDER / name), "--output", "/pairs", "--teacher.path", "/teacher"]
    spec = parse(GeneratePairsConfig, argv=argv).spec
    sampler = spec.sampler
    kind = sampler.scheduler if sampler.name == "diffusers" else sampler.name
    assert PAIRS[name] == (spec.num_samples, kind, sampler.steps, spec.guidance_scale)
    if sampler.name == "edm_heun":
        karras = (sampler.sigma_min, sampler.sigma_max, sampler.rho, sampler.s_churn)
        assert karras == (0.002, 80.0, 7.0, 0.0)
        assert (spec.fields.x0, spec.fields.x0_dtype) == ("pixels", "float16")
