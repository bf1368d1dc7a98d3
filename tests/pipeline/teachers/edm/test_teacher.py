"""EDM networks as teachers: what they are identified by, what they take and refuse, what one step of theirs is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.schema import DdimSampler, EdmHeunSampler, EdmTeacherConfig, PairsSettings
from pipeline import teachers
from pipeline.teachers.edm.architecture import CONFIG, WEIGHTS
from pipeline.teachers.edm.student import OneStepStudent
from tests.support import tiny_edm, tiny_unet

CPU = torch.device("cpu")
PIXELS: dict[str, Any] = {"fields": {"x0": "pixels"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edm.build(tmp_path_factory.mktemp("edm") / "teacher")


def config(folder: Path, **settings: Any) -> EdmTeacherConfig:
    return EdmTeacherConfig(path=str(folder), **settings)


def settings(**changes: Any) -> PairsSettings:
    return PairsSettings.model_validate({"sampler": {"name": "edm_heun"}, **PIXELS, **changes})


def test_identity_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    identity = teachers.identify(config(folder))
    assert (identity.kind, identity.schedule, identity.parametrization) == ("edm", "edm", "x0")
    assert identity.latent_scale is None
    assert identity.sample_shape == identity.image_shape == (3, 16, 16)
    again = tiny_edm.build(tmp_path / "again")
    assert teachers.identify(config(again)) == identity
    described = json.loads((again / CONFIG).read_bytes())
    (again / CONFIG).write_text(json.dumps({**described, "one_step_sigma": 80.0}))
    assert teachers.identify(config(again)) == identity
    (again / CONFIG).write_text(json.dumps({**described, "sigma_data": 0.4}))
    assert teachers.identify(config(again)).weights_digest != identity.weights_digest
    (again / CONFIG).write_text(json.dumps(described))
    weights = load_file(again / WEIGHTS)
    weights["model.map_layer0.bias"][0] += 1
    save_file(weights, again / WEIGHTS)
    assert teachers.identify(config(again)).weights_digest != identity.weights_digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"name": "diffusers"}}, "give edm_heun or ddim"),
        ({"guidance_scale": 2.0}, "spec.guidance_scale: EDM networks know no empty condition"),
        ({"negative_prompt": "7"}, "spec.negative_prompt: EDM networks are not guided"),
        ({"fields": {"x0": "latent"}}, "works on pixels and has no latent"),
        ({"fields": {"x0": "pixels", "text_embedding": True}}, "has no text encoder"),
    ],
)
def test_settings_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    teachers.check(config(folder), settings())
    with pytest.raises(UserError, match=message):
        teachers.check(config(folder), settings(**changes))


def test_an_unconditional_teacher_has_no_class_to_store(tmp_path: Path) -> None:
    teacher = config(tiny_edm.build(tmp_path / "teacher", label_dim=0))
    with pytest.raises(UserError, match=r"spec.fields.prompt: this teacher has no classes"):
        teachers.check(teacher, settings())
    teachers.check(teacher, settings(fields={"x0": "pixels", "prompt": False}))


def test_the_published_numbers_of_evaluations(folder: Path) -> None:
    counts = {
        steps: teachers.sampler_evaluations(config(folder), EdmHeunSampler(steps=steps), 1.0) for steps in (18, 256)
    }
    assert counts == {18: 35, 256: 511}
    assert teachers.sampler_evaluations(config(folder), DdimSampler(steps=8), 1.0) == 8


def test_folders_that_are_not_whole_or_not_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        teachers.identify(config(tmp_path / "none"))
    with pytest.raises(UserError, match=r"is a file; make a folder of it with stages/convert_edm.py"):
        teachers.identify(config(folder / WEIGHTS))
    with pytest.raises(UserError, match=r"has no config.json; convert a checkpoint"):
        teachers.identify(config(tmp_path))
    described = json.loads((folder / CONFIG).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"model.safetensors: missing"):
        teachers.identify(config(tmp_path))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        teachers.load(config(tmp_path), CPU)
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    for change, message in (
        (
            {"channel_mult": [1, 3]},
            r"model.dec.16x16_block0.conv0.weight has shape \(8, 24, 3, 3\), not \(8, 32, 3, 3\)",
        ),
        ({"architecture": "vit"}, "architecture: Input should be 'ddpm"),
        ({"channel_mult": [1, 2, 3, 4, 5, 6]}, "img_resolution 16 cannot be halved 5 times"),
        ({"model_channels": 132}, r"config.json: model_channels: there is no such network: num_channels \(132\) must"),
        ({"model_channels": 2}, r"config.json: .*model_channels: Input should be greater than or equal to 4"),
        ({"model_channels": 3}, r"config.json: .*model_channels: Input should be a multiple of 2"),
    ):
        (tmp_path / CONFIG).write_text(json.dumps({**described, **change}))
        with pytest.raises(UserError, match=message):
            teachers.load(config(tmp_path), CPU)


def test_a_condition_is_the_class_alone(folder: Path) -> None:
    teacher = teachers.load(config(folder), CPU)
    assert torch.equal(teacher.encode_prompts(["3", "9", ""]), torch.stack([*torch.eye(10)[[3, 9]], torch.zeros(10)]))
    assert teacher.truncated(["3", "4"]) == [False, False]
    for wrong in ("10", "03", "-1", "cat", "3 ", "٣"):
        with pytest.raises(UserError, match="is no class of this teacher; give numbers from 0 to 9"):
            teacher.encode_prompts([wrong])


def test_an_unconditional_teacher_takes_nothing(tmp_path: Path) -> None:
    teacher = teachers.load(config(tiny_edm.build(tmp_path / "teacher", label_dim=0)), CPU)
    assert teacher.encode_prompts(["", ""]).shape == (2, 0)
    with pytest.raises(UserError, match="'3' given, and this teacher has no classes"):
        teacher.encode_prompts(["3"])


def test_a_sample_of_one_step_is_the_belief_at_the_first_level(folder: Path) -> None:
    teacher = teachers.load(config(folder), CPU)
    z, condition = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.eye(10)[[1, 2]]
    x0 = teacher.denoiser(80 * z, torch.full((2,), 80.0), condition)
    for sampler in (DdimSampler(steps=1), EdmHeunSampler(steps=1)):
        sample = teacher.sample(z, condition, condition, sampler, 1.0, seed=0, sample_ids=[0, 1])
        torch.testing.assert_close(sample, x0, atol=1e-5, rtol=0)


@pytest.mark.parametrize("support", [tiny_edm, tiny_unet])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_teacher_of_low_precision_can_be_float32_for_a_while(tmp_path: Path, support: Any, dtype: str) -> None:
    folder = support.build(tmp_path / "teacher")
    exact, low = teachers.load(config(folder), CPU), teachers.load(config(folder, dtype=dtype), CPU)
    x_t, sigma = tiny_edm.noisy((0.5,), support.SIZE)
    arguments = x_t, sigma, torch.eye(10)[:1]
    before, wanted = low.denoiser(*arguments), exact.denoiser(*arguments)
    with low.float32():
        widened = low.denoiser(*arguments)
    assert torch.equal(low.denoiser(*arguments), before)
    difference = (before - wanted).abs().max()
    assert 0 < difference < 0.05
    assert not torch.equal(widened, before)


# ------------------------------------------------------------------------------------------------------ students


def test_a_student_comes_back_as_it_went(folder: Path, tmp_path: Path) -> None:
    network = teachers.load_network(config(folder, dtype="bfloat16"))
    assert network.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    with torch.no_grad():
        network.model.map_layer0.bias += 1
    (tmp_path / "student").mkdir()
    teachers.save_student(config(folder), network.state_dict(), tmp_path / "student", timestep=40.0)
    assert teachers.is_student(config(folder), tmp_path / "student")

    student = OneStepStudent(tmp_path / "student")
    z = torch.randn(2, *student.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(40 * z, torch.tensor(40.0), torch.eye(10)[[4, 7]])
    assert torch.equal(student(z, [4, 7]), expected)

    system, sampler = teachers.as_system(config(folder), tmp_path / "student")
    teacher = teachers.load(system, CPU)
    condition = teacher.encode_prompts(["4", "7"])
    sample = teacher.sample(z, condition, condition, sampler, 1.0, seed=0, sample_ids=[0, 1])
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)


def test_a_teacher_is_no_student(folder: Path) -> None:
    with pytest.raises(UserError, match="has no one_step_sigma, so this is a teacher"):
        teachers.as_system(config(folder), folder)


def test_the_weights_of_another_network_are_no_student(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="map_layer0"):
        teachers.save_student(config(folder), {}, tmp_path, timestep=80.0)


def test_the_code_on_the_card_runs(tmp_path: Path) -> None:
    for number, (build, size, settings) in enumerate(
        (
            (tiny_edm.build, 16, {"label_dim": 0}),
            (tiny_edm.build, 16, {"label_dim": 10}),
            (tiny_unet.build, 8, {"num_class_embeds": None}),
            (tiny_unet.build, 8, {"num_class_embeds": 10}),
        )
    ):
        teacher = config(build(tmp_path / f"teacher{number}", **settings))
        student = tmp_path / f"student{number}"
        student.mkdir()
        teachers.save_student(teacher, teachers.load_network(teacher).state_dict(), student, timestep=80.0)
        names: dict[str, Any] = {}
        exec(teachers.student_usage(teacher, str(student)).code, names)
        assert names["images"].shape == (8, 3, size, size)
