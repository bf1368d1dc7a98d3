"""Pairs of EDM teachers: classes drawn or listed, images unclipped, what they cost, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from diffusers import EDMEulerScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.schema import EdmTeacherConfig, GeneratePairsConfig, MixtureTeacherConfig, VerifyShardsConfig
from pipeline import teachers
from pipeline.class_labels import draw_labels
from pipeline.diffusion.samplers import edm_heun
from pipeline.diffusion.schedules import karras_sigmas
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.noise import noise
from pipeline.shards.members import decode_array, decode_image, to_uint8
from tests.support import tiny_edm, tiny_unet
from tests.support.toy import samples


def pairs(output: Path, teacher: Path, **sections: Any) -> GeneratePairsConfig:
    tree: dict[str, Any] = {
        "output": str(output),
        "teacher": {"kind": "edm", "path": str(teacher)},
        "prompts": {"path": "classes"},
        "spec": {"sampler": {"name": "edm_heun", "steps": 4}, "num_samples": 10, "fields": {"x0": "pixels"}},
        "layout": {"samples_per_shard": 4},
        "runtime": {"executor": "in-process", "batch_size": 4, "lease_period_s": 0.2},
    }
    for name, entries in sections.items():
        tree[name] = {**tree[name], **entries} if isinstance(entries, dict) else entries
    return GeneratePairsConfig.model_validate(tree)


def test_pairs_of_drawn_classes_are_those_of_heun_s_method(tmp_path: Path) -> None:
    folder = tiny_edm.build(tmp_path / "teacher")
    generate_pairs(pairs(tmp_path / "pairs", folder))
    found = samples(tmp_path / "pairs")
    labels = list(draw_labels(10, 0, 10))
    teacher = teachers.load(EdmTeacherConfig(path=str(folder)), torch.device("cpu"))
    z = torch.from_numpy(np.stack([noise(0, i, (3, 16, 16)) for i in range(10)])).float()
    condition = torch.eye(10)[[int(label) for label in labels]]
    with torch.no_grad():
        expected = edm_heun(teacher.denoiser, z, condition, karras_sigmas(4, 0.002, 80.0, 7.0))
    largest = 0.0
    for i, (members, row) in enumerate(found.values()):
        assert sorted(members) == ["cls", "json", "noise.npy", "png", "x0.npy"]
        assert members["cls"].decode() == row["prompt"] == labels[i]
        x0 = decode_array(members["x0.npy"])
        assert x0.dtype == np.float16
        largest = max(largest, float(np.abs(x0).max()))
        np.testing.assert_allclose(
            x0.astype(np.float32), expected[i].numpy(), atol=2e-3 * expected[i].abs().max().item()
        )
        shown = decode_image(members["png"]).astype(int)
        assert np.abs(shown - to_uint8(expected[i].numpy()).astype(int)).max() <= 1
    assert largest > 1  # nothing was clipped
    verify_shards(VerifyShardsConfig(root=str(tmp_path / "pairs"), deep=4))


@pytest.mark.parametrize("scheduler", ["EDMEulerScheduler", "CMStochasticIterativeScheduler"])
def test_pairs_of_a_diffusers_network_are_those_of_heun_s_method(tmp_path: Path, scheduler: str) -> None:
    folder = tiny_unet.build(tmp_path / "teacher", scheduler, kind=tiny_unet.OPENAI)
    generate_pairs(pairs(tmp_path / "pairs", folder))
    labels = torch.tensor([int(label) for label in draw_labels(10, 0, 10)])
    unet, noise_scale = UNet2DModel.from_pretrained(folder / "unet"), 1000 if scheduler.startswith("CM") else 1

    def denoiser(x: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """Written as diffusers' EDM pipelines have it; with the other scheduler, only what it is told differs."""
        theirs, level = EDMEulerScheduler(), sigma[:, None, None, None]
        x_in, c_noise = theirs.precondition_inputs(x, level), noise_scale * theirs.precondition_noise(sigma)
        return theirs.precondition_outputs(x, unet(x_in, c_noise, class_labels=classes).sample, level)

    z = torch.from_numpy(np.stack([noise(0, i, (3, 8, 8)) for i in range(10)])).float()
    with torch.no_grad():
        expected = edm_heun(denoiser, z, labels, karras_sigmas(4, 0.002, 80.0, 7.0))
    for (members, row), x0, label in zip(samples(tmp_path / "pairs").values(), expected, labels, strict=True):
        assert members["cls"].decode() == row["prompt"] == str(label.item())
        stored = decode_array(members["x0.npy"]).astype(np.float32)
        np.testing.assert_allclose(stored, x0.numpy(), atol=2e-3 * x0.abs().max().item())
    verify_shards(VerifyShardsConfig(root=str(tmp_path / "pairs"), deep=4))


def test_weights_of_another_network_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for folder, weights in (
        (tiny_edm.build(tmp_path / "edm"), "model.safetensors"),
        (tiny_unet.build(tmp_path / "unet"), "unet/diffusion_pytorch_model.safetensors"),
    ):
        tensors = load_file(folder / weights)
        first = min(tensors)
        save_file({**tensors, first: torch.ones(3, 1)}, folder / weights)
        with pytest.raises(UserError, match=rf"{first} has shape \(3, 1\), not"):
            generate_pairs(pairs(tmp_path / "pairs", folder))
        assert not (tmp_path / "pairs").exists()


def test_other_readers_take_a_label_for_a_number(tmp_path: Path) -> None:
    generate_pairs(pairs(tmp_path / "pairs", tiny_edm.build(tmp_path / "teacher")))
    shards = sorted(map(str, (tmp_path / "pairs/shards").glob("*.tar")))
    read = [sample["cls"] for sample in wds.WebDataset(shards, shardshuffle=False).decode()]
    assert read == [int(label) for label in draw_labels(10, 0, 10)]


def test_listed_classes_are_taken_in_order(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("7\n7\n0\n")
    prompts = {"path": str(tmp_path / "labels.txt"), "keep_duplicates": True}
    spec = {"num_samples": None, "pairs_per_prompt": 2}
    generate_pairs(pairs(tmp_path / "pairs", tiny_edm.build(tmp_path / "teacher"), prompts=prompts, spec=spec))
    assert [members["cls"].decode() for members, _ in samples(tmp_path / "pairs").values()] == list("777700")


def test_an_unconditional_teacher_has_no_labels(tmp_path: Path) -> None:
    folder = tiny_edm.build(tmp_path / "teacher", label_dim=0)
    fields = {"x0": "none", "prompt": False}
    generate_pairs(pairs(tmp_path / "pairs", folder, spec={"fields": fields, "sampler": {"name": "ddim", "steps": 2}}))
    found = samples(tmp_path / "pairs")
    assert Counter(tuple(sorted(members)) for members, _ in found.values()) == {("json", "noise.npy", "png"): 10}
    assert {row["prompt"] for _, row in found.values()} == {""}
    verify_shards(VerifyShardsConfig(root=str(tmp_path / "pairs"), deep=2))


def test_a_prompt_that_is_no_class_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    folder = tiny_edm.build(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("3\na cat\n")
    prompts = {"path": str(tmp_path / "prompts.txt")}
    with pytest.raises(UserError, match="prompts: 'a cat' is no class of this teacher"):
        generate_pairs(pairs(tmp_path / "pairs", folder, prompts=prompts, spec={"num_samples": 2}))
    assert not (tmp_path / "pairs").exists()


def test_classes_are_for_teachers_that_have_them(tmp_path: Path) -> None:
    config = pairs(tmp_path / "pairs", tmp_path).model_copy(update={"teacher": MixtureTeacherConfig(image_size=8)})
    with pytest.raises(UserError, match="classes is for teachers of kind edm; a mixture teacher takes texts"):
        generate_pairs(config)


@pytest.mark.parametrize(
    ("steps", "num_samples", "counted"),
    [
        (18, 100_000, "3,500,000 (35 a sample)"),
        (256, 25_000, "12,775,000 (511 a sample)"),
    ],
)
def test_the_plan_has_the_published_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: int,
    num_samples: int,
    counted: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = {"sampler": {"name": "edm_heun", "steps": steps}, "num_samples": num_samples}
    for folder in (tiny_edm.build(tmp_path / "edm"), tiny_unet.build(tmp_path / "unet")):
        generate_pairs(pairs(tmp_path / "pairs", folder, spec=spec, runtime={"gpus_per_actor": 1}, plan=True))
        assert f"teacher evaluations  {counted}" in capsys.readouterr().out
        assert not (tmp_path / "pairs").exists()
