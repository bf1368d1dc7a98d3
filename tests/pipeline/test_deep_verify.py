"""The teacher, run again, returns what is stored: to the bit on this machine, however the sample was made."""

import shutil

import numpy as np
import pytest
import torch
from support.forge import flip
from support.tiny_sd import build
from support.toy import toy_config

from configs.errors import UserError
from configs.schema import StableDiffusionTeacherConfig, VerifyShardsConfig
from pipeline.deep_verify import deep_verify
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.shards.dataset import Dataset
from pipeline.shards.manifest import read_commits, read_index
from pipeline.shards.storage import Storage
from pipeline.teachers.mixture import MixtureTeacher
from pipeline.teachers.stable_diffusion import StableDiffusionTeacher


def compare(root, num_samples):
    dataset = Dataset.open(Storage.open(str(root)))
    comparisons = deep_verify(dataset, read_commits(dataset), num_samples, dataset.run.teacher)
    return {int(found.key): found.relative_rms for found in comparisons}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


@pytest.mark.parametrize(("asked", "expected"), [(1, [0]), (4, [0, 10, 20, 30]), (40, range(40)), (99, range(40))])
def test_samples_are_spread_evenly_over_the_dataset(root, asked, expected):
    found = compare(root, asked)
    assert sorted(found) == list(expected)
    assert max(found.values()) < 1e-3


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_a_picture_is_compared_as_it_would_be_stored(tmp_path, kind):
    config = toy_config(tmp_path / "root", tmp_path, spec={"num_samples": 16, "fields": {"x0": "none", "image": kind}})
    generate_pairs(config)
    assert set(compare(tmp_path / "root", 16).values()) == {0.0}


def test_what_was_saved_in_float32_is_made_so_again(tmp_path, monkeypatch):
    # Half precision "overflows" for one sample: it is made alone, in float32, and differs from what a batch gives.
    config = toy_config(
        tmp_path / "root",
        tmp_path,
        teacher=StableDiffusionTeacherConfig(path=str(build(tmp_path / "sd")), dtype="bfloat16"),
        spec={
            "sampler": {"name": "diffusers", "steps": 3},
            "num_samples": 8,
            "fields": {"x0_dtype": "float32"},
            "guidance_scale": 3.0,
        },
    )
    original = StableDiffusionTeacher.sample

    def sample(self, *args, sample_ids, **kwargs):
        x0 = original(self, *args, sample_ids=sample_ids, **kwargs)
        return (
            x0
            if len(sample_ids) == 1
            else torch.where(torch.tensor([i == 5 for i in sample_ids])[:, None, None, None], torch.nan, x0)
        )

    with monkeypatch.context() as patched:
        patched.setattr(StableDiffusionTeacher, "sample", sample)
        patched.setattr("pipeline.shard_maker.max_rejected", lambda *_: 8)
        generate_pairs(config)
    dataset = Dataset.open(Storage.open(str(tmp_path / "root")))
    (commit,) = read_commits(dataset)
    made = read_index(dataset, commit)["made_in_float32"].to_pylist()
    assert made == [i == 5 for i in range(8)]
    calls = []

    def spy(self, *args, sample_ids, **kwargs):
        calls.append(sample_ids)
        return original(self, *args, sample_ids=sample_ids, **kwargs)

    monkeypatch.setattr(StableDiffusionTeacher, "sample", spy)
    found = compare(tmp_path / "root", 8)
    assert calls == [[0, 1, 2, 3, 4, 6, 7], [5]]
    assert found[5] == 0.0
    assert max(found.values()) < 0.02


def test_output_that_is_not_finite_differs_infinitely(root, monkeypatch):
    original = MixtureTeacher.sample

    def sample(self, *args, sample_ids, **kwargs):
        x0 = original(self, *args, sample_ids=sample_ids, **kwargs)
        x0[[i == 10 for i in sample_ids]] = torch.nan
        return x0

    monkeypatch.setattr(MixtureTeacher, "sample", sample)
    found = compare(root, 4)
    assert [key for key, difference in found.items() if np.isinf(difference)] == [10]


def test_nothing_to_compare_is_said(root, tmp_path, monkeypatch):
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "SEALED.json").unlink()
    for tar in (copy / "shards").iterdir():
        tar.write_bytes(flip(tar.read_bytes(), 1200))
    with pytest.raises(UserError, match=r"--deep: .*: there is no whole shard, so nothing can be compared"):
        verify_shards(VerifyShardsConfig(root=str(copy), deep=4))
    for commit in (copy / "commits").iterdir():
        commit.unlink()
    with pytest.raises(UserError, match=r"--deep: .*: there is no whole shard, so nothing can be compared"):
        verify_shards(VerifyShardsConfig(root=str(copy), deep=4))

    monkeypatch.setattr(MixtureTeacher, "sample", lambda self, noise, *_, **__: torch.zeros_like(noise))
    generate_pairs(
        toy_config(tmp_path / "bad", tmp_path, spec={"num_samples": 2}, runtime={"max_rejected_fraction": 1})
    )
    with pytest.raises(UserError, match=r"--deep: .*: every sample was rejected, so nothing can be compared"):
        verify_shards(VerifyShardsConfig(root=str(tmp_path / "bad"), deep=4))
