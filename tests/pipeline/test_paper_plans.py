"""What --plan says of the paper's configurations is what the paper says they cost."""

from pathlib import Path

import pytest
import torch
from support import tiny_edm, tiny_sd

import configs
from configs.load import parse
from configs.schema import GeneratePairsConfig
from pipeline.generate import generate_pairs

FOLDER = Path(configs.__file__).parent


def edm_teacher(folder, size, classes):
    """The smallest teacher of such images and classes."""
    return tiny_edm.build(folder, label_dim=classes, img_resolution=size, channel_mult=(1,), attn_resolutions=())


def planned(name, teacher, tmp_path, capsys, *more):
    """The lines of a plan, which writes nothing."""
    argv = ["--config", str(FOLDER / name), "--output", str(tmp_path / "out"), "--teacher.path", str(teacher)]
    config = parse(GeneratePairsConfig, argv=[*argv, "--plan", *more])
    if config.teacher.kind == "stable_diffusion":  # a folder has no revision
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"revision": None})})
    generate_pairs(config)
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().out.splitlines()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Then there is no probe: counts follow from the configuration."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


EDM = {
    "cifar10/pairs_cond.yaml": (32, 10, "100,000", "3,500,000 (35 a sample)"),
    "cifar10/pairs_uncond.yaml": (32, 0, "500,000", "17,500,000 (35 a sample)"),
    "imagenet64/pairs.yaml": (64, 1000, "25,000", "12,775,000 (511 a sample)"),
}


@pytest.mark.parametrize("name", EDM)
def test_pairs_of_an_edm_teacher(name, tmp_path, capsys):
    size, classes, samples, evaluations = EDM[name]
    lines = planned(name, edm_teacher(tmp_path / "teacher", size, classes), tmp_path, capsys)
    assert f"samples              {samples} (1 for each of {samples} prompts)" in lines
    assert f"teacher evaluations  {evaluations}" in lines


@pytest.mark.parametrize(
    ("name", "samples", "evaluations"),
    [  # the paper counts 50 steps; PNDM calls the network once more
        ("sd15/pairs.yaml", 500_000, "51,000,000 (102 a sample)"),
        ("sd15/guidance8/pairs.yaml", 12_000_000, "1,224,000,000 (102 a sample)"),
    ],
)
def test_pairs_of_stable_diffusion(name, samples, evaluations, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("one prompt, so that millions need not be written\n")
    flags = ("--prompts.path", str(tmp_path / "prompts.txt"), "--spec.pairs_per_prompt", str(samples))
    lines = planned(name, tiny_sd.build(tmp_path / "teacher"), tmp_path, capsys, *flags)
    assert f"samples              {samples:,} ({samples} for each of 1 prompts)" in lines
    assert f"teacher evaluations  {evaluations}" in lines
