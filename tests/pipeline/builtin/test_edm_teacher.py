"""A small EDM teacher comes out as a folder that the teachers' code loads, the same after a kill; and it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.fashion import write_fashion

from configs.builtin_schema import FitConfig, SmallEdmTeacherConfig
from configs.errors import UserError
from configs.schema import EdmTeacherConfig
from pipeline import teachers
from pipeline.builtin import edm_teacher as module
from pipeline.builtin import fit as fit_module
from pipeline.builtin.edm_teacher import train_edm_teacher
from pipeline.builtin.garments import Garments

CPU = torch.device("cpu")


def config(fashion: Path, output: Path, **changes: Any) -> SmallEdmTeacherConfig:
    fit = FitConfig(steps=4, batch_size=4, learning_rate=1e-3, warmup_steps=1)
    shape: dict[str, Any] = {"model_channels": 8, "channel_mult": (1, 2), "attn_resolutions": (16,)}
    return SmallEdmTeacherConfig(
        **{"output": output, "data": fashion, "device": "cpu", "save_every_steps": 2, "fit": fit, **shape, **changes}
    )


def test_a_garment_is_itself_with_its_class(fashion: Path) -> None:
    garments = Garments(fashion, "train", 0)
    images, classes = garments.untinted(3, 8)
    looks = garments.batch(3, 8).looks
    assert classes.tolist() == [look.garment for look in looks]
    assert images.shape == (8, 3, 32, 32)
    assert (images[:, :, :6] == -1).all()
    inside = images[:, :, 6:26, 8:24]
    assert torch.equal(inside[:, 0], inside[:, 2])
    assert inside.min() >= 2 / 255 - 1
    assert inside.max() == 1


def test_channels_that_norms_cannot_divide_are_refused_before_anything_is_written(
    fashion: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="model_channels: there is no such network: "):
        train_edm_teacher(config(fashion, tmp_path / "teacher", model_channels=132))
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize("conditional", [True, False])
def test_killed_and_started_again_it_ends_in_the_same_weights(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, conditional: bool
) -> None:
    straight = train_edm_teacher(config(fashion, tmp_path / "straight", conditional=conditional))
    save = fit_module._save

    def save_and_die(state: dict[str, object], checkpoint: Path) -> None:
        save(state, checkpoint)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_module, "_save", save_and_die)
    killed = config(fashion, tmp_path / "killed", conditional=conditional)
    with pytest.raises(KeyboardInterrupt):
        train_edm_teacher(killed)
    monkeypatch.setattr(fit_module, "_save", save)
    resumed = train_edm_teacher(killed)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    teacher = teachers.load(EdmTeacherConfig(path=str(resumed)), CPU)
    assert teacher.identity.sample_shape == (3, 32, 32)
    assert teacher.encode_prompts([""]).shape == (1, 10 if conditional else 0)


@torch.no_grad()
def test_at_first_the_loss_is_that_of_saying_nothing(fashion: Path, tmp_path: Path) -> None:
    # D = c_skip x_t, so the weighted error is (|x0|^2 s^2 + d^4 |eps|^2) / (d^2 (s^2 + d^2)) in the mean over pixels.
    settings = config(fashion, tmp_path)
    described = module.EdmArchitecture(
        architecture="ddpm++", img_resolution=32, label_dim=10, model_channels=8, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(16,),
    )  # fmt: skip
    images, classes = Garments(fashion, "train", 0).untinted(0, 32)
    draws = torch.Generator().manual_seed(0)
    network = module._initial(described, 0)
    loss = module._loss(network, described, settings, images, classes, draws).item()
    draws = torch.Generator().manual_seed(0)
    sigma = (-1.2 + 1.2 * torch.randn(32, generator=draws)).exp()[:, None, None, None]
    eps = torch.randn(images.shape, generator=draws)
    bias = network.model.dec["32x32_aux_conv"].bias[:, None, None]
    c_out = 0.5 * sigma / (sigma**2 + 0.25).sqrt()
    error = 0.25 / (sigma**2 + 0.25) * (images + sigma * eps) + c_out * bias - images
    expected = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error.square()).mean().item()
    assert math.isclose(loss, expected, rel_tol=1e-3)


def test_it_learns(fashion: Path, tmp_path: Path) -> None:
    def trained(steps: int) -> float:
        fit = FitConfig(steps=steps, batch_size=8, learning_rate=1e-2, warmup_steps=1)
        settings = config(fashion, tmp_path / str(steps), fit=fit, save_every_steps=steps)
        folder = train_edm_teacher(settings)
        row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| loss |"))
        return float(row.split("|")[2])

    assert trained(30) < 0.8 * trained(1)


def read_images(folder: Path) -> list[tuple[int, bytes]]:
    """Class and pixels of every picture, sorted."""
    found: list[tuple[int, bytes]] = []
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            found.append((int(path.parent.name), image.tobytes()))
    return sorted(found)


def test_every_test_garment_is_left_for_comparison_once_however_often_it_was_killed(
    fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = Image.Image.save, list[object]()

    def save_some(image: Image.Image, *args: Any, **more: Any) -> None:
        if len(saved) == 7:
            raise KeyboardInterrupt
        saved.append(args)
        save(image, *args, **more)

    monkeypatch.setattr(Image.Image, "save", save_some)
    with pytest.raises(KeyboardInterrupt):
        train_edm_teacher(config(fashion, tmp_path))
    assert not (tmp_path / "test_images").exists()
    monkeypatch.setattr(Image.Image, "save", save)
    train_edm_teacher(config(fashion, tmp_path))

    test = Garments(fashion, "test", 3)  # of another order: it is the set that counts
    images, classes = test.untinted(0, len(test))
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert read_images(tmp_path / "test_images") == sorted(
        (class_, image.numpy().tobytes()) for class_, image in zip(classes.tolist(), pixels, strict=True)
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"teacher", "test_images"}
    assert not (tmp_path / "test_images.part").exists()


@pytest.mark.parametrize(("split", "name"), [("train", "data"), ("test", "test_data")])
def test_with_other_data_it_does_not_go_on(fashion: Path, tmp_path: Path, split: str, name: str) -> None:
    train_edm_teacher(config(fashion, tmp_path / "teacher"))
    other = write_fashion(tmp_path / "other", **{split: 39})
    with pytest.raises(UserError, match=rf"begun with other settings \({name} was "):
        train_edm_teacher(config(other, tmp_path / "teacher"))
