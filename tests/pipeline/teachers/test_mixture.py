import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import (
    DdimSampler,
    DiffusersSampler,
    EdmHeunSampler,
    FieldsConfig,
    MixtureTeacherConfig,
    PairsSettings,
    SamplerConfig,
)
from pipeline import teachers
from pipeline.noise import noise as derived_noise
from pipeline.teachers.mixture import MixtureTeacher
from pipeline.teachers.pictures import captions, draw_all

CONFIG = MixtureTeacherConfig(image_size=8)
CAPTIONS = captions()
STOCHASTIC = EdmHeunSampler(steps=24, s_churn=8.0)
SAMPLERS = [EdmHeunSampler(), DdimSampler(steps=40), STOCHASTIC]


@pytest.fixture(scope="module")
def teacher() -> MixtureTeacher:
    teacher = teachers.load(CONFIG, torch.device("cpu"))
    assert isinstance(teacher, MixtureTeacher)
    return teacher


def noise(ids: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.stack([derived_noise(0, i, (3, 8, 8)) for i in ids])).float()


def sample(
    teacher: MixtureTeacher, prompts: list[str], sampler: SamplerConfig, guidance_scale: float = 1.0, first: int = 0
) -> Tensor:
    ids = range(first, first + len(prompts))
    condition, unconditional = teacher.encode_prompts(prompts), teacher.encode_prompts([""])
    return teacher.sample(noise(ids), condition, unconditional, sampler, guidance_scale, seed=0, sample_ids=ids)


def judge(x0: Tensor) -> tuple[Tensor, Tensor]:
    """For each sample its most probable picture, and that picture's posterior weight among all of them."""
    means = torch.from_numpy(draw_all(8)).double() / 127.5 - 1
    squared = (x0.double()[:, None] - means).square().flatten(2).sum(-1)
    posterior = (-squared / (2 * CONFIG.std**2)).softmax(1)
    weight, picture = posterior.max(1)
    return picture, weight


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{getattr(s, 's_churn', '')}")
def test_samples_are_pictures_the_prompt_names(
    teacher: MixtureTeacher, sampler: SamplerConfig, guidance_scale: float
) -> None:
    named = {
        "a red circle": {"a red circle"},
        "blue": {c for c in CAPTIONS if "blue" in c},
        "some ring": {c for c in CAPTIONS if "ring" in c},
        "a red blue circle": {"a red circle", "a blue circle"},
    }
    prompts = [prompt for prompt in named for _ in range(4)]
    x0 = sample(teacher, prompts, sampler, guidance_scale)
    picture, weight = judge(x0)
    assert weight.min() > 0.999
    assert all(CAPTIONS[i] in named[p] for p, i in zip(prompts, picture.tolist(), strict=True))
    means = torch.from_numpy(draw_all(8))[picture] / 127.5 - 1
    rms = (x0 - means).square().mean((1, 2, 3)).sqrt() / CONFIG.std
    assert 0.7 < rms.min() <= rms.max() < 2.0


def test_pictures_come_as_often_as_their_weights_say(teacher: MixtureTeacher) -> None:
    picture, _ = judge(sample(teacher, [""] * 960, EdmHeunSampler(steps=12)))
    counts = torch.bincount(picture, minlength=48).double()
    chi_square = ((counts - 20) ** 2 / 20).sum().item()
    assert chi_square < 82.7  # 47 degrees of freedom, one in a thousand
    picture, _ = judge(sample(teacher, ["a white diamond or cross"] * 400, EdmHeunSampler(steps=12), first=960))
    counts = torch.bincount(picture, minlength=48)
    assert {CAPTIONS[i] for i in counts.nonzero().flatten().tolist()} == {"a white diamond", "a white cross"}
    assert abs(counts[CAPTIONS.index("a white diamond")].item() - 200) < 3.3 * 10  # binomial, 3.3 std


def test_prompts_restrict_the_pictures(teacher: MixtureTeacher) -> None:
    named = {
        "": CAPTIONS,
        "photograph of nothing": CAPTIONS,
        "A RED, circle!": ["a red circle"],
        "blue": [c for c in CAPTIONS if "blue" in c],
        "ring": [c for c in CAPTIONS if "ring" in c],
        "red blue circle": ["a red circle", "a blue circle"],
        "coloured circled": CAPTIONS,
    }
    weights = teacher.encode_prompts(list(named))
    assert weights.shape == (len(named), 48)
    assert weights.dtype == torch.float32
    for row, expected in zip(weights, named.values(), strict=True):
        assert [c for c, w in zip(CAPTIONS, row.tolist(), strict=True) if w > -math.inf] == expected
        assert set(row[row.isfinite()].tolist()) == {0.0}
    assert teacher.truncated(["red " * 1000]) == [False]


def test_no_guidance_is_the_conditional_distribution(teacher: MixtureTeacher) -> None:
    condition, elsewhere = teacher.encode_prompts(["green"] * 3), teacher.encode_prompts(["black ring"])
    arguments = {"sampler": EdmHeunSampler(steps=8), "seed": 0, "sample_ids": range(3)}
    x0 = [
        teacher.sample(noise(range(3)), c, u, guidance_scale=w, **arguments)
        for c, u, w in [
            (condition, elsewhere, 1.0),
            (condition, condition, 3.0),
            (elsewhere.expand(3, -1), condition, 0.0),
        ]
    ]
    torch.testing.assert_close(x0[1], x0[0], rtol=0, atol=1e-5)
    assert torch.equal(x0[2], x0[0])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{getattr(s, 's_churn', '')}")
def test_a_sample_alone_is_the_sample_in_a_batch(teacher: MixtureTeacher, sampler: SamplerConfig) -> None:
    prompts = ["red", "", "a blue ring", "circle"]
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    batch = sample(teacher, prompts, sampler, 2.0)
    alone = torch.cat([sample(teacher, [p], sampler, 2.0, first=i) for i, p in enumerate(prompts)])
    torch.testing.assert_close(alone, batch, rtol=0, atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_churn_adds_noise_of_its_own(teacher: MixtureTeacher) -> None:
    """All of one sample's randomness is not its starting noise: another id with the same start ends elsewhere."""
    condition, same = teacher.encode_prompts([""] * 2), noise([0]).expand(2, -1, -1, -1)
    x0 = teacher.sample(same, condition, condition, STOCHASTIC, 1.0, seed=0, sample_ids=[0, 1])
    assert (x0[0] - x0[1]).abs().max() > 0.05
    quiet = teacher.sample(same, condition, condition, EdmHeunSampler(), 1.0, seed=0, sample_ids=[0, 1])
    assert torch.equal(quiet[0], quiet[1])


@pytest.mark.parametrize("sampler", [EdmHeunSampler(steps=5), DdimSampler(steps=5), STOCHASTIC])
@pytest.mark.parametrize(("guidance_scale", "branches"), [(0.0, 1), (1.0, 1), (3.0, 2)])
def test_evaluations_are_the_rows_the_network_saw(
    teacher: MixtureTeacher,
    monkeypatch: pytest.MonkeyPatch,
    sampler: SamplerConfig,
    guidance_scale: float,
    branches: int,
) -> None:
    seen: list[int] = []
    denoiser = teacher.denoiser

    def counting(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        seen.append(len(x_t))
        return denoiser(x_t, t, condition)

    monkeypatch.setattr(teacher, "_denoiser", counting)
    sample(teacher, ["red", "blue"], sampler, guidance_scale)
    assert set(seen) == {2 * branches}
    assert sum(seen) == 2 * teachers.sampler_evaluations(CONFIG, sampler, guidance_scale)


def test_identity_is_pinned() -> None:
    """Other bytes on any platform or NumPy would make every toy dataset another one."""
    identity = teachers.identify(MixtureTeacherConfig())
    assert identity.weights_digest == "c784eb8e64e04eaeb32f39d3d2d057a3a2073398a25691ab0366cabaaf65cf40"
    assert (identity.parametrization, identity.schedule, identity.dtype) == ("x0", "edm", "float32")
    assert identity.sample_shape == identity.image_shape == (3, 32, 32)
    assert identity.latent_scale is None
    others = [MixtureTeacherConfig(std=0.06), MixtureTeacherConfig(image_size=16)]
    assert len({teachers.identify(c).weights_digest for c in [MixtureTeacherConfig(), *others]}) == 3


def test_x0_is_the_image_and_always_float32(teacher: MixtureTeacher) -> None:
    x0 = 2 * noise([0])
    with teacher.float32():
        assert torch.equal(teacher.decode(x0), x0)
    assert sample(teacher, ["red"], DdimSampler(steps=2)).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": DiffusersSampler()}, r"spec.sampler.name: diffusers is for Stable Diffusion"),
        ({"fields": FieldsConfig(x0="latent")}, r"spec.fields.x0: .* set x0: pixels"),
        ({"fields": FieldsConfig(x0="pixels", text_embedding=True)}, r"spec.fields.text_embedding"),
    ],
)
def test_check(settings: dict[str, object], message: str) -> None:
    good = {"sampler": DdimSampler(), "fields": FieldsConfig(x0="pixels")}
    teachers.check(CONFIG, PairsSettings(**good))
    with pytest.raises(UserError, match=message):
        teachers.check(CONFIG, PairsSettings(**(good | settings)))
