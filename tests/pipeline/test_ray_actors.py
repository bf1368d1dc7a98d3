"""Actors of a Ray cluster, without a dataset: as many as there should be, replaced when broken, and let go.

The drivers that use them are in test_ray_executor.py.
"""

import os
import signal
from contextlib import nullcontext
from functools import partial
from itertools import chain, repeat
from types import SimpleNamespace

import pytest
from ray.autoscaler.sdk import request_resources
from support.toy import toy_config

from configs.errors import RunStopped, UserError
from configs.schema import PairsRuntime
from pipeline import ray_executor
from pipeline.driver import StopRequest, drive
from pipeline.generate import generate_pairs
from pipeline.ray_executor import RayExecutor, connect
from tests.support import workers


class Recorder:
    def __init__(self):
        self.done, self.given_up = [], []

    def committed(self, outcome, result):
        self.done.append(outcome.shard)

    def failed(self, outcome, attempt):
        pass

    def parked(self, shard, outcome, attempts, reason):
        self.given_up.append((shard, reason))

    def tick(self, executor, num_waiting):
        pass


@pytest.fixture
def connected(head, monkeypatch):
    import ray

    monkeypatch.setenv("RAY_ADDRESS", head.address)
    yield
    ray.shutdown()


def run_shards(executor, shards):
    recorder = Recorder()
    drive(executor, shards, recorder, StopRequest(), max_errors_per_shard=3, max_crashes_per_shard=10)
    return recorder


@pytest.mark.parametrize("address", ["right", "wrong"])
def test_a_stop_request_made_before_ray_is_met_is_heard_afterwards(connected, monkeypatch, address):
    """As an evaluation does: it handles SIGTERM all along, and each system's drawing handles it meanwhile."""
    if address == "wrong":
        monkeypatch.setenv("RAY_ADDRESS", "no address")
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().installed() as evaluation:
        with nullcontext() if address == "right" else pytest.raises(UserError, match="RAY_ADDRESS"):
            connect()
        with StopRequest().installed() as drawing:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (drawing.requested, evaluation.requested) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)
        assert evaluation.requested
    assert signal.getsignal(signal.SIGTERM) == before


def test_there_are_as_many_actors_as_asked_for(connected, tmp_path):
    executor = RayExecutor(partial(workers.MeetingWorker, tmp_path), PairsRuntime(actors=3, cpus_per_actor=0.5))
    recorder = run_shards(executor, range(14))
    assert executor.num_workers == 3
    executor.close()
    assert sorted(recorder.done) == list(range(14))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_broken_actor_does_not_park_the_dataset(connected, tmp_path):
    executor = RayExecutor(partial(workers.BrokenWorker, tmp_path), PairsRuntime(actors=2))
    recorder = run_shards(executor, range(200))
    executor.close()
    assert sorted(recorder.done) == list(range(200))
    assert recorder.given_up == []


def test_an_actor_that_dies_idle_comes_back_whole(connected, tmp_path):
    executor = RayExecutor(partial(workers.IdleWorker, tmp_path), PairsRuntime(actors=1))
    run_shards(executor, range(3))
    (process,) = tmp_path.iterdir()
    os.kill(int(process.name), signal.SIGKILL)
    recorder = run_shards(executor, range(20))
    executor.close()
    assert sorted(recorder.done) == list(range(20))
    assert recorder.given_up == []


def test_actors_that_fit_nowhere_are_refused_before_anything_is_written(connected, tmp_path):
    for runtime, message in (
        ({"cpus_per_actor": 64}, "runtime.cpus_per_actor: no node of the cluster has 64 CPUs"),
        ({"cpus_per_actor": 64, "actors": 1}, "runtime.cpus_per_actor: no node of the cluster has 64 CPUs"),
        ({"gpus_per_actor": 1}, "runtime.gpus_per_actor: no node of the cluster has 1 CPUs and 1 GPUs"),
    ):
        config = toy_config(tmp_path / "root", tmp_path, runtime={**runtime, "executor": "ray"})
        with pytest.raises(UserError, match=message):
            generate_pairs(config)
    assert not (tmp_path / "root").exists()


@pytest.fixture
def requests(connected, monkeypatch):
    """What this process asks of the autoscaler, in order; each request stands until the next.

    Not what the cluster has been asked for: where Ray Data has run, an actor of its own replaces that now and then.
    """
    made = []

    def request(bundles):
        made.append(bundles)
        request_resources(bundles=bundles)

    monkeypatch.setattr(ray_executor, "request_resources", request)
    return made


@pytest.mark.parametrize("end", [UserError, KeyboardInterrupt])
def test_a_node_that_did_not_come_is_asked_for_no_longer(requests, tmp_path, monkeypatch, end):
    asked, now = [], [0.0]

    def wait(seconds):
        asked.extend(requests)
        if end is KeyboardInterrupt:
            raise KeyboardInterrupt
        now[0] += seconds

    monkeypatch.setattr(ray_executor, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=wait))
    with pytest.raises(end):
        RayExecutor(partial(workers.IdleWorker, tmp_path), PairsRuntime(cpus_per_actor=64, wait_for_resources_s=0.5))
    assert asked == [[{"CPU": 64}]]
    assert requests == [[{"CPU": 64}], []]


def test_a_node_that_came_is_asked_for_until_the_run_ends(requests, tmp_path, monkeypatch):
    rooms = chain([0], repeat(2))  # as if the node came a second later
    monkeypatch.setattr(RayExecutor, "_room", lambda self: next(rooms))
    executor = RayExecutor(partial(workers.IdleWorker, tmp_path), PairsRuntime(wait_for_resources_s=60))
    recorder = run_shards(executor, range(3))
    assert requests == [[{"CPU": 1}]]
    executor.close()
    assert requests == [[{"CPU": 1}], []]
    assert sorted(recorder.done) == [0, 1, 2]


def test_a_run_that_finds_room_leaves_the_requests_of_others(requests, tmp_path):
    executor = RayExecutor(partial(workers.IdleWorker, tmp_path), PairsRuntime())
    executor.close()
    assert requests == []


def test_a_teacher_that_loads_nowhere_ends_the_run(connected, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "_MAX_FAILED_LOADS", 4)  # each takes a process
    executor = RayExecutor(partial(workers.NodeWithoutTeacher, tmp_path), PairsRuntime(actors=2))
    with pytest.raises(RunStopped, match="no actor can load what it needs: nothing at"):
        run_shards(executor, range(20))
    executor.close()
