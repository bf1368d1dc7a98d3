"""Mistakes in a Stable Diffusion teacher or its sampler: one line each, and nothing written."""

import shutil

import pytest
from support.sd_pairs import DDIM, sd_config
from support.tiny_sd import build

from configs.errors import UserError
from pipeline.generate import generate_pairs


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (
            {"scheduler": "DDIMSchedular"},
            r"spec.sampler.scheduler: diffusers has no DDIMSchedular; did you mean DDIMSch",
        ),
        ({"scheduler": "DPMSolverSDEScheduler"}, r"spec.sampler.scheduler: DPMSolverSDEScheduler does not suit"),
        (
            {"scheduler": "DDIMScheduler", "options": {"timestep_spaceing": "trailing"}},
            r"spec.sampler.options.timestep_spaceing: DDIMScheduler has no such option; did you mean timestep_spacing",
        ),
        (
            {"scheduler": "DDIMScheduler", "options": {"timestep_spacing": "trailling"}},
            r"spec.sampler: DDIMScheduler with 3 steps: .*trailling",
        ),
    ],
)
def test_a_mistake_in_the_sampler_is_one_line_and_writes_nothing(sd, tmp_path, sampler, message):
    config = sd_config(tmp_path / "root", tmp_path, sd, spec={"sampler": {**DDIM, **sampler}})
    with pytest.raises(UserError, match=message) as caught:
        generate_pairs(config)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt"]


def missing(folder):
    shutil.rmtree(folder)


def without_index(folder):
    (folder / "model_index.json").unlink()


def pickled(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))


def without_weights(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, r"teacher.path: there is no folder .*/teacher"),
        (without_index, r"teacher.path: .*/teacher has no model_index.json"),
        (pickled, r"unet: only pickled weights \(diffusion_pytorch_model.bin\), which are never loaded"),
        (without_weights, r"vae/diffusion_pytorch_model.safetensors: missing; copy or download the folder again"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_is_one_line_and_writes_nothing(sd, tmp_path, damage, message):
    damage(shutil.copytree(sd, tmp_path / "teacher"))
    there = sorted(tmp_path.rglob("*"))
    config = sd_config(tmp_path / "root", tmp_path, tmp_path / "teacher")
    with pytest.raises(UserError, match=message) as caught:
        generate_pairs(config)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == sorted([*there, tmp_path / "prompts.txt"])
