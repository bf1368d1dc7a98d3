"""Pair generation on a cluster whose actors, raylets, nodes, driver and head are killed at random moments.

Whatever a schedule kills, the same command, run until it succeeds, must leave the dataset that an undisturbed run
makes: every sample once, the same shards byte for byte, and after a collection of garbage not a file more.
"""

import os
import time
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml
from faults.chaos.disturbed_run import DisturbedRun
from faults.chaos.schedule import schedule
from support.toy import files, shard_bytes, toy_config

from configs.schema import VerifyShardsConfig
from pipeline.generate import generate_pairs
from pipeline.inspect_dataset import verify_shards
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage
from pipeline.shards.verify import verify

NUM_SHARDS = 12
NUM_SAMPLES = 45  # the last shard is not full
SEEDS = range(54)
ALWAYS = (13,)
"""Seeds of the schedules that every run of the tests has: an actor, then the driver."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The configuration as a file, its model, and the dataset it makes in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = toy_config(
        folder / "root",
        folder,
        spec={"sampler": {"name": "edm_heun", "steps": 60}, "pairs_per_prompt": 16, "num_samples": NUM_SAMPLES},
        teacher={"image_size": 32},
        layout={"samples_per_shard": 4},
    )
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"output", "plan"})))
    generate_pairs(config)
    assert len(shard_bytes(folder / "root")) == NUM_SHARDS
    return path, config, folder / "root"


@pytest.mark.parametrize(
    "seed", [seed if seed in ALWAYS else pytest.param(seed, marks=pytest.mark.faults) for seed in SEEDS]
)
def test_whatever_is_killed_the_dataset_is_the_same(undisturbed, cluster, ledger, tmp_path, seed):
    path, config, truth = undisturbed
    root, temp = tmp_path / "root", tmp_path / "temp"
    temp.mkdir()
    command = (
        "generate_pairs", "--config", path, "--output", root, "--runtime.executor", "ray",
        "--runtime.temp_dir", temp, "--runtime.wait_for_resources_s", 1000,
    )  # fmt: skip
    entry = DisturbedRun(command, root, temp, cluster).run(seed, schedule(seed, NUM_SHARDS))

    findings = verify(Dataset.open(Storage.open(str(root))))
    assert (findings.problems, findings.missing) == ([], [])
    indices = [row for file in sorted((root / "index").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert Counter(row["key"] for row in indices if row["status"] == "ok") == Counter(
        f"{i:09d}" for i in range(NUM_SAMPLES)
    )
    assert shard_bytes(root) == shard_bytes(truth)

    generate_pairs(config.model_copy(update={"output": str(root)}))  # has nothing left to do
    make_old(root)
    verify_shards(VerifyShardsConfig(root=str(root), gc=True))
    assert names(root) == names(truth)
    ledger.add(entry)


def make_old(root):
    """Every file of a dataset two days old, so that none is too young for the collection of garbage."""
    before = time.time() - 2 * 24 * 3600
    for path in root.rglob("*"):
        os.utime(path, (before, before))


def names(root):
    """The files of a dataset, but for its logs, which each run of the command adds to."""
    return {name for name in files(root) if not name.startswith("events/")}
