"""The shards are plain WebDataset: three readers we did not write take them as they are."""

import numpy as np
import pytest
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


def test_webdataset(shards):
    import webdataset as wds

    dataset = wds.WebDataset(shards, shardshuffle=False).decode("rgb8")
    check(
        [
            {"key": s["__key__"], "noise": s["noise.npy"], "x0": s["x0.npy"], "image": s["png"], "prompt": s["txt"], "json": s["json"]}
            for s in dataset
        ]
    )  # fmt: skip


def test_hugging_face_datasets(shards, tmp_path):
    import datasets

    loaded = datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", cache_dir=str(tmp_path))
    samples = []
    for s in loaded:
        samples.append(
            {
                "key": s["__key__"],
                "noise": np.asarray(s["noise.npy"], dtype=np.float16),
                "x0": np.asarray(s["x0.npy"]),
                "image": np.asarray(s["png"]),
                "prompt": s["txt"],
                "json": s["json"],
            }
        )
    check(samples)


def test_ray_data(shards, head):
    import subprocess
    import sys

    code = f"""
import ray, pickle, sys
ray.init({head.address!r}, log_to_driver=False, configure_logging=False)
rows = ray.data.read_webdataset({shards!r}).take_all()
sys.stdout.buffer.write(b"ROWS" + pickle.dumps([dict(row) for row in rows]))
"""
    import pickle

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()
    rows = pickle.loads(done.stdout.partition(b"ROWS")[2])
    check(
        [
            {"key": r["__key__"], "noise": r["noise.npy"], "x0": r["x0.npy"], "image": np.asarray(r["png"]), "prompt": r["txt"], "json": r["json"]}
            for r in rows
        ]
    )  # fmt: skip
