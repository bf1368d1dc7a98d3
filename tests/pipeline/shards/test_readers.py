"""The shards are plain WebDataset: three readers we did not write take them as they are."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from support.patience import PATIENCE_S
from support.toy import PROMPTS, toy_config

from pipeline.generate import generate_pairs
from pipeline.noise import noise


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readers")
    generate_pairs(toy_config(folder / "root", folder))
    return sorted(str(path) for path in (folder / "root" / "shards").glob("*.tar"))


def check(samples):
    """Every sample once; noise, prompt and metadata are those of its key."""
    assert sorted(sample["key"] for sample in samples) == [f"{i:09d}" for i in range(40)]
    for sample in samples:
        i = int(sample["key"])
        np.testing.assert_array_equal(sample["noise"], noise(7, i, (3, 8, 8)))
        assert sample["x0"].shape == (3, 8, 8)
        assert sample["image"].shape == (8, 8, 3)
        assert sample["prompt"] == PROMPTS[i // 8]
        assert sample["json"]["key"] == sample["key"]


def named(sample):
    """A sample under the names of ``check``, from its members' names."""
    names = {"key": "__key__", "noise": "noise.npy", "x0": "x0.npy", "image": "png", "prompt": "txt", "json": "json"}
    return {name: sample[suffix] for name, suffix in names.items()}


def test_webdataset(shards):
    import webdataset as wds

    dataset = wds.WebDataset(shards, shardshuffle=False).decode("rgb8")
    check([named(sample) for sample in dataset])


def test_hugging_face_datasets(shards, tmp_path):
    import datasets

    loaded = datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", cache_dir=str(tmp_path))
    arrays = {"noise.npy": np.float16, "x0.npy": np.float16, "png": np.uint8}
    check([named(s | {name: np.asarray(s[name], dtype) for name, dtype in arrays.items()}) for s in loaded])


def test_ray_data(shards, head):
    code = f"""
import ray, pickle, sys
ray.init({head.address!r}, log_to_driver=False, configure_logging=False)
rows = ray.data.read_webdataset({shards!r}).take_all()
sys.stdout.buffer.write(b"ROWS" + pickle.dumps([dict(row) for row in rows]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = pickle.loads(done.stdout.partition(b"ROWS")[2])
    check([named(row | {"png": np.asarray(row["png"])}) for row in rows])
