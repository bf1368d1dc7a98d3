"""Teacher and judge come out as folders that the libraries load, the same after a kill."""

import hashlib
import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from support.fashion import write_fashion

from configs.builtin_schema import BuiltinJudgeConfig, BuiltinTeacherConfig, FitConfig
from configs.errors import UserError
from configs.schema import DiffusersSampler, StableDiffusionTeacherConfig
from pipeline import teachers
from pipeline.builtin import fit as fit_module
from pipeline.builtin.garments import Garments
from pipeline.builtin.judge import train_judge
from pipeline.builtin.teacher import train_teacher

FIT = FitConfig(steps=3, batch_size=4, learning_rate=1e-3, warmup_steps=1)


def teacher_config(fashion, output):
    return BuiltinTeacherConfig(
        output=output, data=fashion, device="cpu", save_every_steps=2, autoencoder=FIT, text_to_image=FIT
    )


def judge_config(fashion, output):
    return BuiltinJudgeConfig(output=output, data=fashion, device="cpu", save_every_steps=2, contrastive=FIT)


@pytest.fixture(scope="module", autouse=True)
def quick_scale():
    """Of 64 garments many tinted copies tell little more than some about the scale of latents."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipeline.builtin.teacher._SCALE_SAMPLES", 256)
        yield


@pytest.fixture(scope="module")
def teacher(fashion, tmp_path_factory):
    return train_teacher(teacher_config(fashion, tmp_path_factory.mktemp("teacher")))


@pytest.fixture(scope="module")
def judge(fashion, tmp_path_factory):
    return train_judge(judge_config(fashion, tmp_path_factory.mktemp("judge")))


def digests(folder):
    """Of every file by its path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("which", ["teacher", "judge"])
def test_killed_after_any_checkpoint_it_ends_in_the_same_files(request, fashion, tmp_path, monkeypatch, which):
    straight = digests(request.getfixturevalue(which))
    assert straight
    make, config = {"teacher": (train_teacher, teacher_config), "judge": (train_judge, judge_config)}[which]
    save, saved = fit_module._save, []

    def save_and_die(state, checkpoint):
        save(state, checkpoint)
        if checkpoint not in saved:
            saved.append(checkpoint)
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "_save", save_and_die)
    for _ in range(5):
        try:
            folder = make(config(fashion, tmp_path))
            break
        except KeyboardInterrupt:
            continue
    assert len(saved) == {"teacher": 2, "judge": 1}[which]
    assert digests(folder) == straight
    assert digests(make(config(fashion, tmp_path))) == straight  # when all is trained, too


@pytest.mark.parametrize("which", ["teacher", "judge"])
def test_with_other_data_it_does_not_go_on(request, tmp_path, which):
    trained = request.getfixturevalue(which)
    make, config = {"teacher": (train_teacher, teacher_config), "judge": (train_judge, judge_config)}[which]
    before = digests(trained.parent)
    other = write_fashion(tmp_path, train=63)
    with pytest.raises(UserError, match=r"begun with other settings \(data was "):
        make(config(other, trained.parent))
    assert digests(trained.parent) == before


def test_the_teacher_is_a_pipeline_of_diffusers_and_ours_alike(teacher):
    ours = teachers.load(StableDiffusionTeacherConfig(path=str(teacher)), torch.device("cpu"))
    assert ours.identity.sample_shape == (4, 8, 8)
    assert ours.identity.image_shape == (3, 32, 32)
    prompts = ["a red sneaker", "navy trousers on a black background"]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    sampler = DiffusersSampler(scheduler="DDIMScheduler", steps=3)
    condition, unconditional = ours.encode_prompts(prompts), ours.encode_prompts([""])
    image = ours.decode(ours.sample(z, condition, unconditional, sampler, 3.0, seed=0, sample_ids=[0, 1]))
    theirs = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(prompts, latents=z, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close((image / 2 + 0.5).clamp(0, 1), expected, atol=1e-4, rtol=0)


def test_latents_have_variance_one(fashion, teacher):
    config = json.loads((teacher / "vae/config.json").read_text())
    network = teachers.load(StableDiffusionTeacherConfig(path=str(teacher)), torch.device("cpu"))._vae
    images = Garments(fashion, "train", 0).batch(0, 512).images
    with torch.no_grad():
        z = network.encode(images).latent_dist.sample(torch.Generator().manual_seed(0))
    assert (z * config["scaling_factor"]).std().item() == pytest.approx(1, abs=0.03)


def test_the_judge_is_a_folder_of_open_clip_and_its_reference_is_of_the_test_split(fashion, judge):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{judge}")
    tokens = open_clip.get_tokenizer(f"local-dir:{judge}")
    model.eval()
    test = Garments(fashion, "test", 0).batch(0, 40)
    with torch.no_grad():
        rows = model.encode_image(test.images).double().numpy()
        assert model.encode_text(tokens(["a red sneaker"])).shape == (1, 64)
    reference = np.load(judge / "reference.npz", allow_pickle=False)
    np.testing.assert_allclose(reference["mu"], rows.mean(0), atol=2e-3)  # weights in float16
    np.testing.assert_allclose(reference["sigma"], np.cov(rows, rowvar=False), atol=2e-3)
    np.testing.assert_allclose(reference["features"], rows, atol=1e-2)
    assert int(reference["count"]) == 40
    picture = Image.fromarray(((test.images[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    torch.testing.assert_close(preprocess(picture), test.images[0], atol=1 / 127, rtol=0)


def test_cards_say_data_licence_recipe_and_numbers(teacher, judge):
    for folder, script in ((teacher, "train_builtin_teacher.py"), (judge, "train_builtin_judge.py")):
        card = (folder / "README.md").read_text()
        for part in ("Fashion-MNIST", "Apache-2.0", script, "learning_rate: 0.001", "parameters", "at revision"):
            assert part in card
        assert str(folder.parent) not in card
