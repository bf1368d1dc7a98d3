"""score_pairs.py and select_pairs.py as a person runs them, with an open_clip network of a few thousand weights."""

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from support import stage, tiny_clip
from support.toy import files, samples, toy_config

from pipeline.generate import generate_pairs
from pipeline.scoring.score_table import read_column
from pipeline.shards.dataset import Dataset
from pipeline.shards.members import decode_image
from pipeline.shards.storage import Storage


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    scorer = {"kind": "clip", "model": f"local-dir:{tiny_clip.build(folder / 'model')}", "prefix": "a photo of "}
    path = folder / "score.yaml"
    path.write_text(yaml.safe_dump({"scorer": scorer, "runtime": {"executor": "in-process"}}))
    return path


def direct(root, config):
    """The cosines by open_clip itself, of all stored samples in order."""
    model = yaml.safe_load(config.read_text())["scorer"]["model"]
    network, _, preprocess = open_clip.create_model_and_transforms(model)
    network.eval()
    tokenize = open_clip.get_tokenizer(model)
    found = []
    for _, (members, row) in sorted(samples(root).items()):
        with torch.inference_mode():
            image = network.encode_image(preprocess(Image.fromarray(decode_image(members["png"])))[None])
            text = network.encode_text(tokenize([f"a photo of {row['prompt']}"]))
            found.append(torch.cosine_similarity(image, text).item())
    return found


def test_score_then_select(root, config, tmp_path):
    before = files(root)
    done = stage.run("score_pairs", root, "--config", config)
    assert done.returncode == 0, done.stderr
    assert "all 5 shards have scores clip; 40/40 images" in done.stdout
    clip = read_column(Dataset.open(Storage.open(str(root))), "clip", "clip")
    np.testing.assert_allclose(clip, direct(root, config), atol=1e-5)
    assert before.items() <= files(root).items()

    where = f"clip > {np.median(clip)!s} and guidance_scale == 1"
    output = tmp_path / "good.parquet"
    done = stage.run("select_pairs", root, "--where", where, "--limit", 7, "--sample_seed", 3, "--output", output)
    assert done.returncode == 0, done.stderr
    keys = pq.read_table(output)["key"].to_pylist()
    assert len(keys) == 7
    assert all(clip[int(key)] > np.median(clip) for key in keys)


@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("score_pairs", ["--name", "Clip!"], "--name: "),
        ("score_pairs", ["--name", "other", "--runtime.gpus_per_actor", "64"], "runtime.gpus_per_actor: 64 asked"),
        ("select_pairs", ["--output", "/tmp/s.parquet", "--sample_seed", "3"], "give limit too"),
        ("select_pairs", ["--output", "/tmp/s.parquet", "--where", "clop > 1"], "error: where: clop: no such column"),
    ],
)
def test_a_mistake_is_one_line(root, config, script, arguments, line, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    options = ["--config", config] if script == "score_pairs" else []
    done = stage.run(script, root, *options, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert (done.stderr.count("\n"), line in done.stderr) == (1, True), done.stderr
