"""What follows a shard sees every shard once it is committed, and its failures cost no shard."""

import pytest
from support.toy import shard_bytes, toy_config

from configs.errors import RunStopped
from pipeline.generate import generate_pairs
from pipeline.shards.dataset import Dataset
from pipeline.shards.storage import Storage


def followers(seen, is_broken=lambda shard, attempt: False):
    """One that notes (shard, is it committed), and fails where it is told to."""

    class Follower:
        def __init__(self, root, fingerprint):
            self.dataset = Dataset.open(Storage.open(root))
            assert self.dataset.run.fingerprint == fingerprint

        def run(self, shard, attempt):
            if is_broken(shard, attempt):
                raise OSError("broken")
            seen.append((shard, self.dataset.commit(shard) is not None))

    return [Follower]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


def test_each_follower_gets_each_shard_once_it_is_committed(alone, tmp_path):
    first, second = [], []
    generate_pairs(toy_config(tmp_path / "root", tmp_path), followers(first) + followers(second))
    assert sorted(first) == sorted(second) == [(shard, True) for shard in range(5)]
    assert shard_bytes(tmp_path / "root") == shard_bytes(alone)


def test_a_follower_that_fails_is_tried_again_and_the_shard_is_not_made_again(alone, tmp_path):
    seen = []
    is_broken = lambda shard, attempt: shard == 2 and attempt == 1  # noqa: E731
    generate_pairs(toy_config(tmp_path / "root", tmp_path), followers(seen, is_broken))
    assert sorted(seen) == [(shard, True) for shard in range(5)]
    assert shard_bytes(tmp_path / "root") == shard_bytes(alone)


def test_a_follower_that_keeps_failing_stops_the_run_and_leaves_a_dataset_that_can_be_finished(alone, tmp_path):
    config, root = toy_config(tmp_path / "root", tmp_path), tmp_path / "root"
    with pytest.raises(RunStopped, match="1 of 5 shards are parked"):
        generate_pairs(config, followers([], lambda shard, attempt: shard == 2))
    dataset = Dataset.open(Storage.open(str(root)))
    assert dataset.sealed is None
    generate_pairs(config)
    assert dataset.sealed is not None
    assert shard_bytes(root) == shard_bytes(alone)
