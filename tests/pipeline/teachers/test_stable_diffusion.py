import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import (
    DdimSampler,
    DiffusersSampler,
    FieldsConfig,
    PairsSettings,
    StableDiffusionTeacherConfig,
)
from pipeline import teachers
from pipeline.diffusion.guidance import GuidedDenoiser, guided
from pipeline.diffusion.parametrization import to_x0
from pipeline.diffusion.samplers import ddim
from pipeline.teachers.schedulers import make_scheduler, sample_generators
from pipeline.teachers.stable_diffusion import StableDiffusionTeacher

PROMPTS = ["a red circle", "", "this prompt is longer than the tokenizer allows"]
NEGATIVE = "ugly"
IDS = [11, 12, 13]
CPU = torch.device("cpu")
SAMPLERS = [
    DiffusersSampler(scheduler="PNDMScheduler", steps=6),
    DiffusersSampler(scheduler="DDIMScheduler", steps=6),
    DiffusersSampler(scheduler="DPMSolverMultistepScheduler", steps=6),
    DiffusersSampler(scheduler="EulerDiscreteScheduler", steps=6, options={"timestep_spacing": "trailing"}),
    DiffusersSampler(scheduler="HeunDiscreteScheduler", steps=6),
    DiffusersSampler(scheduler="EulerAncestralDiscreteScheduler", steps=6),
    DiffusersSampler(scheduler="DDIMScheduler", steps=6, options={"eta": 0.7}),
]


def load(folder: Path, **entries: Any) -> StableDiffusionTeacher:
    teacher = teachers.load(StableDiffusionTeacherConfig(path=str(folder), **entries), CPU)
    assert isinstance(teacher, StableDiffusionTeacher)
    return teacher


def reference(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def family(request: pytest.FixtureRequest) -> tuple[StableDiffusionTeacher, StableDiffusionPipeline]:
    folder = request.getfixturevalue(request.param)
    return load(folder), reference(folder)


@pytest.fixture(scope="module")
def teacher(sd1: Path) -> StableDiffusionTeacher:
    return load(sd1)


def noise(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def sample(
    teacher: StableDiffusionTeacher,
    settings: DiffusersSampler,
    guidance_scale: float,
    rows: Sequence[int] = (0, 1, 2),
) -> Tensor:
    rows = list(rows)
    return teacher.sample(
        noise()[rows],
        teacher.encode_prompts(PROMPTS)[rows],
        teacher.encode_prompts([NEGATIVE]),
        settings,
        guidance_scale,
        seed=5,
        sample_ids=[IDS[row] for row in rows],
    )


def close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * expected.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: "-".join([s.scheduler, *s.options]))
def test_samples_and_images_are_those_of_the_diffusers_pipeline(
    family: tuple[StableDiffusionTeacher, StableDiffusionPipeline],
    monkeypatch: pytest.MonkeyPatch,
    settings: DiffusersSampler,
    guidance_scale: float,
) -> None:
    teacher, pipeline = family
    options = {key: value for key, value in settings.options.items() if key != "eta"}
    scheduler = getattr(diffusers, settings.scheduler).from_config(pipeline.scheduler.config, **options)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    arguments = {
        "prompt": PROMPTS,
        "negative_prompt": [NEGATIVE] * 3,
        "guidance_scale": guidance_scale,
        "num_inference_steps": settings.steps,
        "eta": settings.options.get("eta", 0.0),
    }
    x0 = sample(teacher, settings, guidance_scale)
    for kind, actual in [("latent", x0), ("pt", (teacher.decode(x0) / 2 + 0.5).clamp(0, 1))]:
        generators = sample_generators(5, IDS)
        expected = pipeline(**arguments, latents=noise(), generator=generators, output_type=kind).images
        close(actual, expected)


def test_prompts_are_encoded_as_the_pipeline_does(
    family: tuple[StableDiffusionTeacher, StableDiffusionPipeline],
) -> None:
    teacher, pipeline = family
    expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(teacher.encode_prompts(PROMPTS), expected)
    assert teacher.truncated(PROMPTS) == [False, False, True]
    assert teacher.truncated(["x" * 22, "x" * 23]) == [False, True]


def test_padding_is_masked_only_where_the_encoder_says_so(sd2: Path, tmp_path: Path, edit: Callable[..., None]) -> None:
    seen = shutil.copytree(sd2, tmp_path / "seen")
    edit(seen / "text_encoder" / "config.json", use_attention_mask=False)
    masked, unmasked = load(sd2).encode_prompts(["a"]), load(seen).encode_prompts(["a"])
    # The encoder is causal: tokens of the prompt come before any padding and cannot see it either way.
    close(masked[:, :3], unmasked[:, :3])
    assert (masked[:, 3:] - unmasked[:, 3:]).abs().amax() > 0.01


@pytest.mark.parametrize("settings", SAMPLERS, ids=lambda s: "-".join([s.scheduler, *s.options]))
def test_a_sample_alone_is_the_sample_in_a_batch(teacher: StableDiffusionTeacher, settings: DiffusersSampler) -> None:
    batch = sample(teacher, settings, 4.0)
    for row in range(3):
        close(sample(teacher, settings, 4.0, rows=[row]), batch[row : row + 1])
    close(sample(teacher, settings, 4.0, rows=[2, 0]), batch[[2, 0]])
    close(teacher.decode(batch[1:2]), teacher.decode(batch)[1:2])


def test_global_randomness_is_neither_used_nor_changed(sd1: Path) -> None:
    settings = DiffusersSampler(scheduler="EulerAncestralDiscreteScheduler", steps=4)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    teacher = load(sd1)
    first = teacher.decode(sample(teacher, settings, 2.0))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(teacher.decode(sample(teacher, settings, 2.0)), first)


@contextmanager
def watching(network: nn.Module) -> Iterator[list[Tensor]]:
    """The network's inputs x_t, one entry a call."""
    seen: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", ["PNDMScheduler", "HeunDiscreteScheduler", "DPMSolverSinglestepScheduler"])
@pytest.mark.parametrize(("guidance_scale", "branches"), [(0.0, 1), (1.0, 1), (3.0, 2)])
def test_evaluations_are_the_rows_the_network_saw(
    sd1: Path, teacher: StableDiffusionTeacher, name: str, guidance_scale: float, branches: int
) -> None:
    settings = DiffusersSampler(scheduler=name, steps=4)
    with watching(teacher._unet) as seen:
        sample(teacher, settings, guidance_scale)
    config = StableDiffusionTeacherConfig(path=str(sd1))
    assert {len(x_t) for x_t in seen} == {3 * branches}
    assert sum(map(len, seen)) == 3 * teachers.sampler_evaluations(config, settings, guidance_scale)


def test_guidance_of_the_prediction_is_guidance_of_x0(
    family: tuple[StableDiffusionTeacher, StableDiffusionPipeline],
) -> None:
    denoiser = family[0].denoiser
    condition, unconditional = family[0].encode_prompts(PROMPTS), family[0].encode_prompts([NEGATIVE])
    t = torch.tensor([10, 500, 999])
    alpha, sigma = denoiser.schedule(t)
    prediction = guided(denoiser.predict, noise(), t, condition, unconditional, 5.0)
    from_prediction = to_x0(prediction, noise(), alpha, sigma, denoiser.parametrization)
    from_x0 = GuidedDenoiser(denoiser, unconditional, 5.0)(noise(), t, condition)
    close(from_x0, from_prediction)


def test_our_ddim_over_the_denoiser_is_the_diffusers_one(
    family: tuple[StableDiffusionTeacher, StableDiffusionPipeline],
) -> None:
    """The denoiser that training will use, and the sampler that made the pairs, are the same model."""
    teacher, _ = family
    settings = DiffusersSampler(scheduler="DDIMScheduler", steps=8, options={"set_alpha_to_one": True})
    timesteps = make_scheduler(settings, teacher._scheduler_config).timesteps
    denoiser = GuidedDenoiser(teacher.denoiser, teacher.encode_prompts([NEGATIVE]), 4.0)
    with torch.no_grad():
        ours = ddim(denoiser, teacher.denoiser.schedule, noise(), timesteps, teacher.encode_prompts(PROMPTS))
    close(ours, sample(teacher, settings, 4.0), relative=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_ends_at_the_network(sd1: Path, teacher: StableDiffusionTeacher, dtype: str) -> None:
    half, settings = load(sd1, dtype=dtype), DiffusersSampler(scheduler="DDIMScheduler", steps=6)
    condition = half.encode_prompts(PROMPTS)
    assert condition.dtype == torch.float32
    assert torch.equal(condition, condition.to(getattr(torch, dtype)).float())  # encoded in half, widened
    with watching(half._unet) as seen:
        x0 = sample(half, settings, 3.0)
    assert {x_t.dtype for x_t in seen} == {getattr(torch, dtype)}
    assert x0.dtype == half.decode(x0).dtype == torch.float32
    # Latents are not rounded between steps: what the network saw last is a rounding of a float32 state.
    assert not torch.equal(x0, x0.to(getattr(torch, dtype)).float())
    full = sample(teacher, settings, 3.0)
    assert 0 < (x0 - full).norm() / full.norm() < {"float16": 0.01, "bfloat16": 0.05}[dtype]


@pytest.mark.parametrize(
    ("dtype", "force_upcast", "expected"),
    [
        ("float16", True, torch.float32),
        ("float16", False, torch.float16),
        ("bfloat16", True, torch.bfloat16),
        ("float32", False, torch.float32),
    ],
)
def test_the_decoder_runs_in_the_precision_its_config_asks_for(
    teacher: StableDiffusionTeacher,
    copy: Path,
    edit: Callable[..., None],
    dtype: str,
    force_upcast: bool,
    expected: torch.dtype,
) -> None:
    edit(copy / "vae" / "config.json", force_upcast=force_upcast)
    other = load(copy, dtype=dtype)
    with watching(other._vae.decoder) as seen:
        image = other.decode(noise())
    assert seen[0].dtype == expected
    assert image.dtype == torch.float32
    close(image, teacher.decode(noise()), relative=0.05 if expected == torch.bfloat16 else 0.005)


def test_latents_are_unscaled_and_shifted_for_the_decoder(copy: Path, edit: Callable[..., None]) -> None:
    edit(copy / "vae" / "config.json", scaling_factor=0.5, shift_factor=0.25)
    teacher = load(copy)
    assert teacher.identity.latent_scale == 0.5
    with torch.no_grad():
        expected = teacher._vae.decode(noise() / 0.5 + 0.25).sample
    assert torch.equal(teacher.decode(noise()), expected)
    assert teacher.decode(100 * noise()).abs().max() > 1  # unclipped


def bits(teacher: StableDiffusionTeacher) -> dict[str, Tensor]:
    networks = {"unet": teacher._unet, "vae": teacher._vae, "text_encoder": teacher._text_encoder}
    return {f"{part}.{k}": v.clone() for part, network in networks.items() for k, v in network.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_widens_every_network_and_restores_every_bit(sd1: Path, dtype: str) -> None:
    teacher, settings = load(sd1, dtype=dtype), DiffusersSampler(scheduler="DDIMScheduler", steps=3)
    before, first = bits(teacher), sample(teacher, settings, 3.0)
    with suppress(FloatingPointError), torch.inference_mode(), teacher.float32():
        assert {value.dtype for value in bits(teacher).values()} == {torch.float32}
        assert teacher.denoiser.network_dtype == torch.float32
        with watching(teacher._unet) as seen:
            wide = sample(teacher, settings, 3.0)
        assert seen[0].dtype == torch.float32
        raise FloatingPointError
    after = bits(teacher)
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    assert not any(parameter.is_inference() for parameter in teacher._unet.parameters())
    assert torch.equal(sample(teacher, settings, 3.0), first)
    assert not torch.equal(wide, first)


def test_the_compiled_network_is_used_but_for_float32(sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []

    def compile_by_counting(network: nn.Module) -> Callable[..., Any]:
        def forward(x_t: Tensor, *arguments: Any, **keywords: Any) -> Any:
            calls.append(x_t.dtype)
            return network(x_t, *arguments, **keywords)

        return forward

    monkeypatch.setattr(torch, "compile", compile_by_counting)
    config = StableDiffusionTeacherConfig(path=str(sd1), dtype="bfloat16")
    compiled = teachers.load(config, CPU, compile=True)
    assert isinstance(compiled, StableDiffusionTeacher)
    settings = DiffusersSampler(scheduler="DDIMScheduler", steps=2)
    for _ in range(2):
        calls.clear()
        assert torch.equal(sample(compiled, settings, 3.0), sample(load(sd1, dtype="bfloat16"), settings, 3.0))
        assert calls == [torch.bfloat16] * 2
        with compiled.float32():
            sample(compiled, settings, 3.0)
        assert calls == [torch.bfloat16] * 2


def test_channels_last_changes_rounding_only(sd1: Path, teacher: StableDiffusionTeacher) -> None:
    config = StableDiffusionTeacherConfig(path=str(sd1))
    other = teachers.load(config, CPU, channels_last=True)
    assert isinstance(other, StableDiffusionTeacher)
    assert other._unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    settings = DiffusersSampler(scheduler="PNDMScheduler", steps=4)
    close(sample(other, settings, 3.0), sample(teacher, settings, 3.0))


def test_networks_are_frozen(teacher: StableDiffusionTeacher) -> None:
    for network in (teacher._unet, teacher._vae, teacher._text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize(
    ("part", "file", "tensor"),
    [
        ("unet", "diffusion_pytorch_model", "conv_in.bias"),
        ("text_encoder", "model", "final_layer_norm.weight"),
    ],
)
def test_missing_weights_are_not_made_up(copy: Path, part: str, file: str, tensor: str) -> None:
    path = copy / part / f"{file}.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if name.endswith(tensor))]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{part}: 1 weights are missing, .*{tensor}"):
        load(copy)


def test_check_accepts_what_works_and_names_what_does_not(sd1: Path) -> None:
    config = StableDiffusionTeacherConfig(path=str(sd1))
    fields = FieldsConfig(text_embedding=True)
    teachers.check(config, PairsSettings(sampler=SAMPLERS[-1], fields=fields))
    with pytest.raises(UserError, match=r"spec.sampler.name: ddim is for teachers on the EDM schedule"):
        teachers.check(config, PairsSettings(sampler=DdimSampler()))
    with pytest.raises(UserError, match=r"did you mean PNDMScheduler"):
        teachers.check(config, PairsSettings(sampler=DiffusersSampler(scheduler="PNDMSchedular")))
