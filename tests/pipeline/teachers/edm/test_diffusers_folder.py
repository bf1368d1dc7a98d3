"""A diffusers folder as an EDM teacher: what it is identified by, what is refused, and its students."""

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.schema import EdmTeacherConfig, PairsSettings
from pipeline import teachers
from pipeline.teachers.edm.diffusers_folder import SCHEDULER_CONFIG, UNET_CONFIG, WEIGHTS
from pipeline.teachers.edm.student import OneStepStudent
from pipeline.teachers.edm.unet2d_config import UNet2DConfig
from tests.support import tiny_unet
from tests.support.tiny_unet import edit

CPU = torch.device("cpu")
SETTINGS = PairsSettings.model_validate({"sampler": {"name": "edm_heun"}, "fields": {"x0": "pixels"}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_unet.build(tmp_path_factory.mktemp("unet") / "teacher")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def config(folder: Path, **settings: Any) -> EdmTeacherConfig:
    return EdmTeacherConfig(path=str(folder), **settings)


def digest(folder: Path) -> str:
    return teachers.identify(config(folder)).weights_digest


# ------------------------------------------------------------------------------------------------------ identity


def test_a_folder_is_an_edm_teacher_of_its_size_and_classes(folder: Path) -> None:
    identity = teachers.identify(config(folder, dtype="bfloat16"))
    assert (identity.kind, identity.schedule, identity.parametrization) == ("edm", "edm", "x0")
    assert (identity.dtype, identity.latent_scale) == ("bfloat16", None)
    assert identity.sample_shape == identity.image_shape == (3, 8, 8)
    assert teachers.num_classes(config(folder)) == 10
    teachers.check(config(folder), SETTINGS)
    teacher = teachers.load(config(folder), CPU)
    assert torch.equal(teacher.encode_prompts(["3", ""]), torch.stack([torch.eye(10)[3], torch.zeros(10)]))


def test_identity_is_of_the_network_and_its_preconditioning(copy: Path) -> None:
    before = digest(copy)
    edit(copy / UNET_CONFIG, _diffusers_version="0.1", _name_or_path="x", sample_size=[8, 8], dropout=0.3)
    edit(copy / UNET_CONFIG, add_attention=..., mid_block_scale_factor=..., one_step_sigma=80.0)
    edit(copy / SCHEDULER_CONFIG, sigma_max=20.0, rho=3.0, sigma_data=...)
    edit(copy / SCHEDULER_CONFIG, _class_name="EDMDPMSolverMultistepScheduler")
    assert digest(copy) == before
    seen = {before}
    for path, key, value in (
        (SCHEDULER_CONFIG, "sigma_data", 0.4),
        (SCHEDULER_CONFIG, "_class_name", "CMStochasticIterativeScheduler"),
        (UNET_CONFIG, "freq_shift", 0),
        (UNET_CONFIG, "norm_eps", 1e-6),
    ):
        edit(copy / path, **{key: value})
        seen.add(digest(copy))
    tensors = load_file(copy / WEIGHTS)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, copy / WEIGHTS)
    assert len(seen | {digest(copy)}) == 6


def test_a_folder_is_looked_at_without_torch_or_diffusers(folder: Path) -> None:
    code = (
        "import sys; from configs.schema import EdmTeacherConfig; from pipeline.teachers.digest import weights_digest; "
        "from pipeline.teachers.edm.folder import open_folder; "
        f"folder = open_folder(EdmTeacherConfig(path={str(folder)!r})); "
        "print(weights_digest({'model': [folder.weights]}, folder.settings)); "
        "assert not {'torch', 'diffusers'} & sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[4], capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == (digest(folder), "")


def test_the_config_is_diffusers_own() -> None:
    theirs = {name: parameter.default for name, parameter in inspect.signature(UNet2DModel).parameters.items()}
    ours = {name: field.default for name, field in UNet2DConfig.model_fields.items() if name != "one_step_sigma"}
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} == {"sample_size"}  # which has to be given


# ------------------------------------------------------------------------------------------------------ refusals


REFUSED_NETWORKS = [
    (
        {"out_channels": 6},
        r"out_channels: Input should be 3 \(6 is there\); an EDM network predicts an image, and no var",
    ),
    ({"in_channels": 4}, r"in_channels: Input should be 3 \(4 is there\); images here are red, green and blue"),
    ({"sample_size": [8, 16]}, r"sample_size: \(8, 16\) is not square; give a network of square images"),
    ({"sample_size": None}, r"sample_size: Input should be .* \(None is there\); it is needed: height and width"),
    ({"sample_size": ...}, "sample_size: Field required; it is needed: height and width"),
    ({"sample_size": 8192}, "sample_size: Input should be less than or equal to 4096"),
    ({"sample_size": 7}, "sample_size: 7 cannot be halved 1 times"),
    (
        {"class_embed_type": "timestep"},
        r"class_embed_type: Input should be None \('timestep' is there\); classes here are",
    ),
    ({"class_embed_type": "identity"}, r"class_embed_type: Input should be None \('identity' is there\); classes here"),
    (
        {"time_embedding_type": "fourier"},
        r"time_embedding_type: Input should be 'positional' \('fourier' is there\); EDM",
    ),
    (
        {"addition_embed_type": "text"},
        r"addition_embed_type: .* not permitted \('text' is there\); UNet2DModel has no such",
    ),
    (
        {"down_block_types": ["CrossAttnDownBlock2D"] * 2},
        "down_block_types: Input should be 'DownBlock2D', .*; only blocks",
    ),
    ({"_class_name": "UNet2DConditionModel"}, "_class_name: 'UNet2DConditionModel' is no UNet2DModel"),
    ({"block_out_channels": [8, 16, 16]}, r"not as diffusers writes it \(ValueError: Must provide the same number of"),
    ({"act_fn": "cosine"}, "not as diffusers writes it"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED_NETWORKS)
def test_another_network_is_refused_by_the_key(copy: Path, entries: dict[str, Any], message: str) -> None:
    edit(copy / UNET_CONFIG, **entries)
    with pytest.raises(UserError, match=f"unet/config.json: {message}"):
        teachers.check(config(copy), SETTINGS)


REFUSED_SCHEDULERS = [
    (
        {"prediction_type": "v_prediction"},
        "prediction_type: 'v_prediction' is not EDM's, .* negate weight and bias of the",
    ),
    ({"prediction_type": "sample"}, "prediction_type: 'sample' is not EDM's"),
    (
        {"_class_name": "DDPMScheduler"},
        "_class_name: 'DDPMScheduler' is no scheduler of EDM .*: EDMEulerScheduler, EDMDPM",
    ),
    ({"_class_name": ["DDPMScheduler"]}, "_class_name: .'DDPMScheduler'. is no scheduler of EDM"),
    ({"_class_name": ...}, "_class_name: None is no scheduler of EDM"),
    ({"sigma_data": 0}, "sigma_data: 0 is no standard deviation of images"),
    ({"sigma_data": "0.5"}, "sigma_data: '0.5' is no standard deviation of images"),
]


@pytest.mark.parametrize(("entries", "message"), REFUSED_SCHEDULERS)
def test_another_scheduler_is_refused_by_the_key(copy: Path, entries: dict[str, Any], message: str) -> None:
    edit(copy / SCHEDULER_CONFIG, **entries)
    with pytest.raises(UserError, match=f"scheduler/scheduler_config.json: {message}"):
        teachers.identify(config(copy))


def test_a_pipeline_of_another_process_is_refused(copy: Path) -> None:
    DDIMScheduler().save_pretrained(copy / "scheduler")
    with pytest.raises(UserError, match="'DDIMScheduler' is no scheduler of EDM"):
        teachers.identify(config(copy))


def test_the_preconditioning_is_never_guessed(copy: Path) -> None:
    missing = (
        "scheduler/scheduler_config.json: missing, so it is not known how the network was preconditioned; .*EDMEuler"
    )
    (copy / SCHEDULER_CONFIG).unlink()
    with pytest.raises(UserError, match=missing):
        teachers.identify(config(copy))
    alone = (
        r"unet/config.json: a UNet2DModel alone, without scheduler/.*EDMEulerScheduler.*the network goes into unet/unet"
    )
    with pytest.raises(UserError, match=alone):
        teachers.identify(config(copy / "unet"))


def test_configs_that_are_no_json_objects_are_refused(copy: Path) -> None:
    for name in (SCHEDULER_CONFIG, UNET_CONFIG):
        (copy / name).write_text("[1]")
        with pytest.raises(UserError, match=f"{name}: not a JSON object"):
            teachers.identify(config(copy))
        (copy / name).write_text("{")
        with pytest.raises(UserError, match=f"{name}: not valid JSON"):
            teachers.identify(config(copy))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model.bin is a pickle, which is never loaded; convert it if you",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors",
            "there is diffusion_pytorch_model.fp16.safetensors: save one float32",
        ),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "there is diffusion_pytorch_model-00001-of-00002.safe"),
        ("other.json", "copy or download the folder again"),
    ],
)
def test_weights_in_another_file_are_refused_with_the_way_to_the_right_one(copy: Path, name: str, message: str) -> None:
    (copy / WEIGHTS).rename(copy / "unet" / name)
    with pytest.raises(UserError, match=f"unet/diffusion_pytorch_model.safetensors: missing; {message}"):
        teachers.identify(config(copy))


Tensors = dict[str, torch.Tensor]
REFUSED_WEIGHTS: list[tuple[Callable[[Tensors], Any], str]] = [
    (
        lambda tensors: tensors.pop("conv_in.bias"),
        "another network than the UNet2DModel it should be: no conv_in.bias$",
    ),
    (lambda tensors: tensors.update(more=torch.ones(1)), "it should be: more is not of it$"),
    (
        lambda tensors: tensors.update(query=tensors.pop("mid_block.attentions.0.to_q.weight")),
        "it should be: no mid_block.attentions.0.to_q.weight; query is not of it$",
    ),
    (
        lambda tensors: tensors.update({"class_embedding.weight": torch.ones(11, 32)}),
        r"it should be: class_embedding.weight has shape \(11, 32\), not \(10, 32\)$",
    ),
    (
        lambda tensors: tensors.update({"conv_in.bias": torch.ones(8).half()}),
        "conv_in.bias is torch.float16, not torch.float32; save the network in float32$",
    ),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_WEIGHTS)
def test_the_weights_of_another_network_are_refused_by_name(
    copy: Path, change: Callable[[Tensors], Any], message: str
) -> None:
    tensors = load_file(copy / WEIGHTS)
    change(tensors)
    save_file(tensors, copy / WEIGHTS)
    for look in (teachers.load_network, lambda teacher: teachers.check(teacher, SETTINGS)):
        with pytest.raises(UserError, match=f"diffusion_pytorch_model.safetensors: .*{message}"):
            look(config(copy))


def test_weights_that_are_cut_short_are_refused(copy: Path) -> None:
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-4])
    with pytest.raises(UserError, match="cut short"):
        teachers.identify(config(copy))
    with pytest.raises(UserError, match="not whole"):
        teachers.load_network(config(copy))


# ------------------------------------------------------------------------------------------------------ students


def test_a_student_is_a_folder_like_its_teacher_s(folder: Path, tmp_path: Path) -> None:
    network = teachers.load_network(config(folder, dtype="bfloat16"))
    assert network.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in network.parameters())
    with torch.no_grad():
        network.model.unet.conv_in.bias += 1
    path = tmp_path / "student"
    path.mkdir()
    teachers.save_student(config(folder), network.state_dict(), path, timestep=40.0)
    assert teachers.is_student(config(folder), path)
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*.*")) == [SCHEDULER_CONFIG, UNET_CONFIG, WEIGHTS]
    assert (path / SCHEDULER_CONFIG).read_text().strip() == (folder / SCHEDULER_CONFIG).read_text().strip()
    described = json.loads((path / UNET_CONFIG).read_bytes())
    assert described.pop("one_step_sigma") == 40.0
    assert described == json.loads((folder / UNET_CONFIG).read_bytes())
    theirs = UNet2DModel.from_pretrained(path / "unet").state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in network.model.unet.state_dict().items())

    student = OneStepStudent(path)
    assert (student.shape, student.num_classes) == ((3, 8, 8), 10)
    z = torch.randn(2, *student.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(40 * z, torch.tensor(40.0), torch.eye(10)[[4, 7]])
    assert torch.equal(student(z, [4, 7]), expected)

    system, sampler = teachers.as_system(config(folder), path)
    teacher = teachers.load(system, CPU)
    condition = teacher.encode_prompts(["4", "7"])
    sample = teacher.sample(z, condition, condition, sampler, 1.0, seed=0, sample_ids=[0, 1])
    torch.testing.assert_close(sample, expected, atol=1e-5, rtol=0)


def test_a_teacher_is_no_student(folder: Path) -> None:
    with pytest.raises(UserError, match=r"unet/config.json has no one_step_sigma, so this is a teacher"):
        teachers.as_system(config(folder), folder)


def test_the_weights_of_another_network_are_no_student(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"conv_in.weight"):
        teachers.save_student(config(folder), {}, tmp_path, timestep=80.0)
    assert not list(tmp_path.iterdir())
