import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import huggingface_hub.constants
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from support.tiny_sd import build
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import DiffusersSampler, MixtureTeacherConfig, StableDiffusionTeacherConfig
from pipeline import teachers
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.generator import OneStepGenerator
from pipeline.teachers.base import Teacher

PROMPTS = ["a red circle", ""]
CPU = torch.device("cpu")


def config(folder: Path, **entries: Any) -> StableDiffusionTeacherConfig:
    return StableDiffusionTeacherConfig(path=str(folder), **entries)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def denoiser(teacher: Teacher, network: nn.Module) -> Denoiser:
    return Denoiser(partial(teacher.call, network), teacher.denoiser.schedule, teacher.denoiser.parametrization)


def changed(network: nn.Module) -> nn.Module:
    """The network after something like training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return network


def halve(folder: Path) -> None:
    """Round every stored weight to float16, and say so in the text encoder's config, as such pipelines do."""
    for path in folder.rglob("*.safetensors"):
        rounded = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
        save_file(rounded, path, metadata={"format": "pt"})
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))


@pytest.fixture(params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# ------------------------------------------------------------------------------------------------- load_network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network_has_the_files_weights_to_the_bit_and_trains_them_all(folder: Path, dtype: str) -> None:
    network = teachers.load_network(config(folder, dtype=dtype))
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    parameters = dict(network.named_parameters())
    assert parameters.keys() == stored.keys() == network.state_dict().keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert torch.equal(parameter, stored[name])
    assert all(module.training for module in network.modules())


def test_the_network_has_no_dropout(copy: Path, edit: Callable[..., None]) -> None:
    edit(copy / "unet" / "config.json", dropout=0.5)
    network = teachers.load_network(config(copy))
    teacher = teachers.load(config(copy), CPU)
    condition, t = teacher.encode_prompts(PROMPTS), torch.tensor([3, 700])
    first = teacher.call(network, noise(), t, condition)
    assert torch.equal(teacher.call(network, noise(), t, condition), first)
    dropping = UNet2DConditionModel.from_pretrained(copy / "unet").train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(teacher.call(dropping, noise(), t, condition), first)


def test_the_network_as_called_is_the_teacher(folder: Path) -> None:
    teacher, network = teachers.load(config(folder), CPU), teachers.load_network(config(folder))
    condition = teacher.encode_prompts(PROMPTS)
    student = denoiser(teacher, network)
    for t in (torch.tensor(999), torch.tensor([0, 641])):
        assert torch.equal(student.predict(noise(), t, condition), teacher.denoiser.predict(noise(), t, condition))
        assert torch.equal(student(noise(), t, condition), teacher.denoiser(noise(), t, condition))


def test_gradient_checkpointing_changes_no_gradient_of_the_network(folder: Path) -> None:
    teacher, network = teachers.load(config(folder), CPU), teachers.load_network(config(folder))
    condition, t = teacher.encode_prompts(PROMPTS), torch.tensor([20, 980])

    def gradients() -> tuple[int, list[Tensor]]:
        with saved_bytes() as count:
            loss = teacher.call(network, noise(), t, condition).square().mean()
        return sum(count), list(torch.autograd.grad(loss, list(network.parameters())))

    plain_bytes, plain = gradients()
    network.enable_gradient_checkpointing()
    fewer_bytes, again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in plain)
    assert fewer_bytes < 0.7 * plain_bytes


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes of each tensor that is kept for the backward pass."""
    counts: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        counts.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counts


def test_a_formula_has_no_network(tmp_path: Path) -> None:
    for call in (
        lambda: teachers.load_network(MixtureTeacherConfig()),
        lambda: teachers.save_student(MixtureTeacherConfig(), {}, tmp_path / "out", timestep=999),
    ):
        with pytest.raises(UserError, match=r"teacher.kind: mixture .* no network .*; use stable_diffusion") as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- what a teacher is to a student in training


def vjp(function: Callable[[Tensor], Tensor], x0: Tensor) -> tuple[Tensor, Tensor]:
    """Image, and the gradient of a random projection of it."""
    x0 = x0.clone().requires_grad_()
    image = function(x0)
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((image * weights).sum(), x0)
    return image.detach(), gradient


def test_decoding_hands_the_gradient_to_x0_and_to_nothing_else(folder: Path) -> None:
    teacher: Any = teachers.load(config(folder), CPU)
    image, gradient = vjp(teacher.decode, noise())
    scale = teacher.identity.latent_scale
    expected_image, expected = vjp(lambda x0: teacher._vae.decode(x0 / scale).sample, noise())
    assert torch.equal(image, expected_image)
    assert torch.equal(gradient, expected)
    slope = (teacher.decode(noise() + 1e-3 * gradient) - teacher.decode(noise() - 1e-3 * gradient)) / 2e-3
    weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    assert (slope * weights).sum().item() == pytest.approx(gradient.square().sum().item(), rel=1e-2)

    x0 = noise().requires_grad_()
    (
        teacher.decode(x0).mean() + teacher.denoiser(x0, torch.tensor(5), teacher.encode_prompts(PROMPTS)).mean()
    ).backward()
    for network in (teacher._unet, teacher._vae, teacher._text_encoder):
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    assert not hasattr(teacher, "train")


def test_nothing_is_recorded_where_torch_records_nothing(sd1: Path) -> None:
    teacher = teachers.load(config(sd1), CPU)
    x0 = noise().requires_grad_()
    recorded = teacher.decode(x0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            image = teacher.decode(x0)
        assert not image.requires_grad
        assert torch.equal(image, recorded)


def test_checkpointed_decoding_keeps_less_and_changes_no_gradient(folder: Path) -> None:
    teacher = teachers.load(config(folder), CPU)
    with saved_bytes() as plain_bytes:
        plain = vjp(teacher.decode, noise())
    teacher.enable_gradient_checkpointing()
    with saved_bytes() as fewer_bytes:
        again = vjp(teacher.decode, noise())
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert sum(fewer_bytes) < 0.5 * sum(plain_bytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_ends_at_the_networks(folder: Path, dtype: str) -> None:
    teacher: Any = teachers.load(config(folder, dtype=dtype), CPU)
    outputs: list[torch.dtype] = []
    teacher._unet.register_forward_hook(lambda module, inputs, output: outputs.append(output[0].dtype))
    expected = teacher.encode_prompts(PROMPTS)
    t, sampler = torch.tensor([100, 999]), DiffusersSampler(scheduler="DDIMScheduler", steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        condition = teacher.encode_prompts(PROMPTS)
        prediction = teacher.denoiser.predict(noise(), t, condition)
        x0 = teacher.denoiser(noise(), t, condition)
        samples = teacher.sample(noise(), condition, condition[1:], sampler, 2.0, seed=0, sample_ids=[0, 1])
        image, gradient = vjp(teacher.decode, x0.detach())
    assert set(outputs) == {torch.bfloat16}
    assert {v.dtype for v in (condition, prediction, x0, samples, image, gradient)} == {torch.float32}
    assert (condition - expected).norm() < 0.05 * expected.norm()
    # Only the prediction is rounded; x0 is computed from it in float32.
    assert torch.equal(prediction, prediction.bfloat16().float())
    assert not torch.equal(x0, x0.bfloat16().float())


def test_autocast_does_not_touch_the_mixture() -> None:
    teacher = teachers.load(MixtureTeacherConfig(image_size=8), CPU)
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    condition, t = teacher.encode_prompts(["a red circle", "a ring"]), torch.tensor([0.5, 3.0])
    with torch.autocast("cpu", torch.bfloat16):
        x0 = teacher.denoiser(x_t, t, condition)
    assert torch.equal(x0, teacher.denoiser(x_t, t, condition))


# ------------------------------------------------------------------------------------------------- save_student


@contextmanager
def no_complaints() -> Iterator[None]:
    """Neither a warning, nor a line of that level in diffusers' log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    diffusers.utils.logging.add_handler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            yield
    finally:
        diffusers.utils.logging.remove_handler(handler)
    lines = [record.getMessage() for record in records]
    assert [line for line in lines if "`accelerate` was not found" not in line] == []  # it is not needed for this


def exported(folder: Path) -> DiffusionPipeline:
    with no_complaints():
        pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def check_export(source: StableDiffusionTeacherConfig, folder: Path, timestep: int) -> None:
    """Export a student of a teacher, and compare what diffusers makes of it with what it is here."""
    teacher, network = teachers.load(source, CPU), changed(teachers.load_network(source))
    teachers.save_student(source, network.state_dict(), folder, timestep=timestep)
    pipeline = exported(folder)
    generator = OneStepGenerator(denoiser(teacher, network), teacher.denoiser.schedule, torch.tensor(timestep))
    arguments: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 1, "guidance_scale": 0, "latents": noise()}
    with torch.no_grad(), no_complaints():
        x0 = generator(noise(), teacher.encode_prompts(PROMPTS))
        latents = pipeline(**arguments, output_type="latent").images
        pixels = torch.from_numpy(pipeline(**arguments, output_type="np").images).permute(0, 3, 1, 2)
        images = (teacher.decode(x0) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(latents, x0, rtol=0, atol=1e-5 * x0.abs().max().item())
    assert (pixels - images).abs().max() < 1 / 255
    assert images.std() > 0.01


@pytest.mark.parametrize("timestep", [999, 399, 0])
def test_one_step_of_the_exported_pipeline_is_the_generator(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timestep: int
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    check_export(config(folder), tmp_path / "out", timestep)
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes == {".json", ".txt", ".safetensors"}


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"])
def test_variants_split_and_rounded_weights_leave_as_one_float32_file(tmp_path: Path, max_shard_size: str) -> None:
    half = build(tmp_path / "half", variant="fp16", max_shard_size=max_shard_size)
    halve(half)
    check_export(config(half, variant="fp16"), tmp_path / "out", 999)
    stored = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*.safetensors")}
    model = "diffusion_pytorch_model.safetensors"
    assert stored.keys() == {f"unet/{model}", f"vae/{model}", "text_encoder/model.safetensors"}
    for path in stored.values():
        assert {v.dtype for v in load_file(path).values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("timestep", [999, 399])
@pytest.mark.parametrize(
    "entries",
    [
        {"rescale_betas_zero_snr": True},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"trained_betas": torch.linspace(1e-4, 0.01, 1000).tolist()},
    ],
    ids=lambda entries: "-".join(map(str, entries))[:20],
)
def test_the_levels_of_the_exported_scheduler_are_the_teachers(
    sd2: Path, tmp_path: Path, edit: Callable[..., None], entries: dict[str, Any], timestep: int
) -> None:

    copy = shutil.copytree(sd2, tmp_path / "copy")
    edit(copy / "scheduler" / "scheduler_config.json", **entries)
    check_export(config(copy), tmp_path / "out", timestep)


def test_weights_under_other_names_or_of_other_shapes_are_refused(sd1: Path, tmp_path: Path) -> None:
    weights = teachers.load_network(config(sd1)).state_dict()
    fewer = {name: tensor for name, tensor in weights.items() if name != "conv_in.bias"}
    for at, (wrong, complaint) in enumerate(
        [
            ({f"module.{name}": tensor for name, tensor in weights.items()}, "module.conv_in.bias"),
            (fewer, "conv_in.bias"),
            (fewer | {"conv_in.bias": torch.zeros(3)}, "size mismatch for conv_in.bias"),
        ]
    ):
        with pytest.raises(RuntimeError, match=complaint):
            teachers.save_student(config(sd1), wrong, tmp_path / str(at), timestep=999)


def test_an_exported_student_is_a_teacher_again(sd1: Path, tmp_path: Path) -> None:
    network = changed(teachers.load_network(config(sd1)))
    teachers.save_student(config(sd1), network.state_dict(), tmp_path / "out", timestep=399)
    again = teachers.load_network(config(tmp_path / "out"))
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in again.state_dict().items())
    assert teachers.identify(config(tmp_path / "out")).schedule.endswith(":400")
