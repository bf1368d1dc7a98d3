"""Latents of real images are those of diffusers' autoencoder, in the space of the teacher's x0."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from support import tiny_sd
from support.real_images import encode_config, image_files, write_folder
from support.toy import samples

from configs.errors import UserError
from configs.schema import StableDiffusionTeacherConfig
from pipeline import teachers
from pipeline.images.encode import encode_images
from pipeline.images.transforms import to_image
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_array
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify
from pipeline.teachers.latents import LatentEncoder

FILES = image_files()


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd.build(tmp_path_factory.mktemp("sd"))


def latents_config(root, folder, sd, **fields):
    source = {"kind": "folder", "path": str(write_folder(folder / "images", FILES))}
    spec = {"fields": {"image": "none", "x0": "latent", "x0_dtype": "float32", **fields}}
    teacher = {"kind": "stable_diffusion", "path": str(sd)}
    return encode_config(root, source, spec=spec, teacher=teacher)


def test_latents_are_those_of_diffusers(sd, tmp_path):
    root = tmp_path / "root"
    encode_images(latents_config(root, tmp_path, sd))
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    for (members, _), data in zip(samples(root).values(), FILES.values(), strict=True):
        image = torch.from_numpy(to_image(data, 16, "center_crop").copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
        np.testing.assert_allclose(decode_array(members["x0.npy"]), expected[0], atol=1e-5)
        assert sorted(members) == ["json", "txt", "x0.npy"]
    dataset = Dataset.open_any(Storage.open(str(root)))
    assert verify(dataset).problems == []
    assert dataset.run.spec.latents.sample_shape == (4, 8, 8)


def test_the_teacher_decodes_what_was_encoded(sd):
    config = StableDiffusionTeacherConfig(path=str(sd))
    teacher = teachers.load(config, torch.device("cpu"), compile=False, channels_last=False)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    vae = AutoencoderKL.from_pretrained(sd, subfolder="vae")
    with torch.no_grad():
        expected = vae.decode(vae.encode(images).latent_dist.mean).sample
        decoded = teacher.decode(LatentEncoder(config, torch.device("cpu"))(images))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_a_latent_that_is_not_finite_is_listed(sd, tmp_path, monkeypatch):
    original = LatentEncoder.__call__

    def spoiled(self, images):
        x0 = original(self, images)
        x0[0, 0, 0, 0] = 1e6  # beyond float16
        return x0

    monkeypatch.setattr(LatentEncoder, "__call__", spoiled)
    config = latents_config(tmp_path / "root", tmp_path, sd, x0_dtype="float16", image="png")
    runtime = config.runtime.model_copy(update={"max_rejected_fraction": 1.0})
    encode_images(config.model_copy(update={"runtime": runtime}))
    sealed = json.loads((tmp_path / "root/SEALED.json").read_bytes())
    assert sealed["rejected_by_reason"] == {"x0 is not finite": 5}  # the first of each batch: 3 + 1, 3 + 1 and 3 images
    assert sealed["num_samples"] == len(FILES) - 5


def test_another_autoencoder_is_another_dataset(sd, tmp_path):
    encode_images(latents_config(tmp_path / "root", tmp_path, sd))
    with pytest.raises(UserError, match=r"latents\.weights_digest"):
        encode_images(latents_config(tmp_path / "root", tmp_path, tiny_sd.build(tmp_path / "other", seed=1)))


def test_mistakes_are_found_before_anything_is_written(sd, tmp_path):
    with pytest.raises(ValueError, match="teacher: missing"):
        encode_config(tmp_path / "root", {"kind": "folder", "path": "/x"}, spec={"fields": {"x0": "latent"}})
    config = latents_config(tmp_path / "root", tmp_path, sd)
    odd = config.model_copy(update={"spec": config.spec.model_copy(update={"image_size": 17})})
    with pytest.raises(UserError, match="17 is not a multiple of 2"):
        encode_images(odd)
    assert not (tmp_path / "root").exists()
