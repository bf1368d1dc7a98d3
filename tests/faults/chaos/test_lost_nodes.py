"""All nodes of a cluster lost at once, as spot nodes are: the run waits for others, and loses no shard."""

from functools import partial

import pytest

from configs.schema import PairsRuntime
from pipeline import ray_executor
from pipeline.driver import StopRequest, drive
from pipeline.ray_executor import RayExecutor
from tests.support import workers


class KillsAllNodes:
    """An observer that kills every node once, after the tenth shard."""

    def __init__(self, cluster):
        self._cluster = cluster
        self.done, self.failed_attempts = [], []

    def committed(self, outcome, result):
        self.done.append(outcome.shard)
        if len(self.done) == 10:
            self._cluster.kill_nodes()

    def failed(self, outcome, attempt):
        self.failed_attempts.append(outcome)

    def parked(self, shard, outcome, attempts, reason):
        raise AssertionError(reason)

    def tick(self, executor, num_waiting):
        self._cluster.keep_up()


@pytest.fixture
def connected(cluster, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    ray.shutdown()


@pytest.mark.faults
def test_the_loss_of_all_nodes_is_waited_out(connected, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "_MAX_FAILED_LOADS", 2)  # as many as there are actors, not ten, to save time
    runtime = PairsRuntime(wait_for_resources_s=600)
    executor = RayExecutor(partial(workers.IdleWorker, tmp_path), runtime)
    observer = KillsAllNodes(connected)
    drive(executor, range(60), observer, StopRequest(), max_errors_per_shard=1, max_crashes_per_shard=10)
    executor.close()
    assert sorted(observer.done) == list(range(60))
    assert observer.failed_attempts
    assert all(outcome.crashed for outcome in observer.failed_attempts)
