"""Pair generation on a real Ray cluster, disturbed in every way a cluster can be.

The undisturbed truth is a run in this process. Whatever happens on the cluster, running the same command again must
give exactly its shards, byte for byte, and must not touch a commit that exists.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from ray.autoscaler.sdk import request_resources
from support import stage
from support.patience import PATIENCE_S
from support.small_disk import small_disk
from support.toy import files, shard_bytes, toy_config

from configs.errors import RunStopped, UserError
from configs.schema import PairsRuntime
from pipeline import ray_executor
from pipeline.driver import StopRequest, drive
from pipeline.generate import generate_pairs
from pipeline.ray_executor import RayExecutor, connect
from pipeline.ray_head import ray_head
from tests.support import workers

NUM_SHARDS = 14


def toy_yaml(folder, **sections):
    """The config of a run that takes some seconds, enough to be disturbed in, as a file, and its model."""
    settings = {
        "spec": {"sampler": {"name": "edm_heun", "steps": 240}, "pairs_per_prompt": 16, "num_samples": 56},
        "teacher": {"image_size": 32},
        "layout": {"samples_per_shard": 4},
        **sections,
    }
    config = toy_config("/tmp/unused", folder, **settings)
    path = folder / "pairs.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"output", "plan"})))
    return path, config


def commit_records(root):
    """What exists. A writer that was killed may have left a staging file beside it, which is none."""
    return {name: data for name, data in files(root / "commits").items() if name.endswith(".json")}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    path, config = toy_yaml(folder)
    generate_pairs(config.model_copy(update={"output": str(folder / "root")}))
    shards = shard_bytes(folder / "root")
    assert len(shards) == NUM_SHARDS
    return path, shards


def generate(truth, root, *arguments):
    return ("generate_pairs", "--config", truth[0], "--output", root, "--runtime.executor", "ray", *arguments)


def report(root):
    return json.loads((root / "report.json").read_bytes())


def actors_of(head):
    """Processes of Ray actors below the head."""
    processes = psutil.Process(head.pid).children(recursive=True)
    return [p for p in processes if "_Actor" in " ".join(p.cmdline()) or p.name().startswith("ray::_Actor")]


def test_a_killed_actor_costs_at_most_its_shards(truth, head, tmp_path):
    root = tmp_path / "root"
    process = stage.start(*generate(truth, root), ray_address=head.address)
    stage.wait_for_commits(root, 1, process)
    victim = actors_of(head)[0]
    victim.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err + out
    assert shard_bytes(root) == truth[1]
    assert 1 <= report(root)["retries_by_cause"]["worker died"] <= 2
    assert report(root)["lost_device_seconds"] > 0


def test_a_stopped_and_then_a_killed_driver_are_resumed_by_the_same_command(truth, head, tmp_path):
    root = tmp_path / "root"
    process = stage.start(*generate(truth, root), ray_address=head.address)
    stage.wait_for_commits(root, 2, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "stopped: on request" in err
    assert not (root / "lease.json").exists()
    assert report(root)["outcome"] == "interrupted"
    assert report(root)["lost_device_seconds"] == 0  # what was in flight has been finished
    stopped = commit_records(root)

    process = stage.start(*generate(truth, root), ray_address=head.address)
    stage.wait_for_commits(root, len(stopped) + 1, process)
    stage.kill(process)
    killed = commit_records(root)
    assert len(stopped) < len(killed) < NUM_SHARDS

    done = stage.run(*generate(truth, root), ray_address=head.address)
    assert done.returncode == 0, done.stderr
    assert shard_bytes(root) == truth[1]
    assert stopped.items() <= killed.items() <= commit_records(root).items()
    assert report(root)["shards_committed"] <= NUM_SHARDS - len(killed)


def test_a_killed_cluster_is_resumed_on_another_one(truth, head, tmp_path):
    root = tmp_path / "root"
    with ray_head(num_cpus=2, num_gpus=0) as doomed:
        process = stage.start(*generate(truth, root), ray_address=doomed.address)
        stage.wait_for_commits(root, 4, process)
        os.killpg(doomed.pid, signal.SIGKILL)
        stage.kill(process)
    before = commit_records(root)
    done = stage.run(*generate(truth, root), ray_address=head.address)
    assert done.returncode == 0, done.stderr
    assert shard_bytes(root) == truth[1]
    assert before.items() <= commit_records(root).items()


def test_of_two_drivers_the_second_steps_back(truth, head, tmp_path):
    root = tmp_path / "root"
    long = generate(truth, root, "--spec.sampler.steps", 20_000)
    first, second = (stage.start(*long, ray_address=head.address) for _ in range(2))
    try:
        deadline = time.monotonic() + PATIENCE_S
        while first.poll() is None and second.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        loser, winner = (first, second) if first.poll() is not None else (second, first)
        _, err = loser.communicate()
        assert winner.poll() is None
    finally:
        stage.kill(first)
        stage.kill(second)
    assert loser.returncode == 2
    assert f"process {winner.pid} on" in err
    assert "is working on this output" in err
    assert json.loads((root / "lease.json").read_bytes())["pid"] == winner.pid


def test_two_drivers_without_a_lease_still_lose_and_repeat_nothing(truth, head, tmp_path):
    root = tmp_path / "root"
    # Nobody looks at the lease within the test, and both have room for actors: they race for every shard.
    crowded = ["--runtime.lease_period_s", 1000, "--runtime.actors", 2, "--runtime.cpus_per_actor", 0.5]
    processes = [stage.start(*generate(truth, root, *crowded), ray_address=head.address) for _ in range(2)]
    while any(process.poll() is None for process in processes):
        (root / "lease.json").unlink(missing_ok=True)  # as if a network or a person had broken it
        time.sleep(0.01)
    assert [process.wait() for process in processes] == [0, 0]
    assert shard_bytes(root) == truth[1]
    assert sorted(files(root / "commits")) == [f"{i:06d}.json" for i in range(NUM_SHARDS)]
    events = [json.loads(line) for log in files(root / "events").values() for line in log.splitlines()]
    raced = [event for event in events if event.get("adopted") and event["device_seconds"] > 0]
    assert raced  # some shard was made twice and committed once


def test_actors_follow_a_cluster_that_grows_and_shrinks(truth, tmp_path):
    root = tmp_path / "root"
    ray = str(Path(sys.executable).with_name("ray"))

    def wait_for_workers(count):
        assert any(f"workers {count}," in line for line in process.stdout), process.stderr.read()

    with ray_head(num_cpus=1, num_gpus=0) as small:
        endless = ["--spec.sampler.steps", 4000, "--runtime.progress_period_s", 0.5]
        process = stage.start(*generate(truth, root, *endless), ray_address=small.address)
        try:
            wait_for_workers(1)
            join = [ray, "start", "--block", f"--address={small.address}", "--num-cpus=1", "--disable-usage-stats"]
            node = subprocess.Popen(join, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            wait_for_workers(2)
            stage.kill(node)
            wait_for_workers(1)
            # The one that is left works on, also at what the lost node had been given.
            num_committed = len(list((root / "commits").iterdir()))
            stage.wait_for_commits(root, min(num_committed + 3, 56 // 4), process)
        finally:
            stage.kill(process)


def test_ray_job_submit_with_three_actors_gives_the_same_shards(truth, head, tmp_path):
    root = tmp_path / "root"
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", "--address", head.jobs, "--working-dir", ".", "--", "python"]
    crowded = ["--runtime.actors", 3, "--runtime.cpus_per_actor", 0.5]
    name, *arguments = map(str, generate(truth, root, *crowded))
    done = subprocess.run(
        [*submit, f"stages/{name}.py", *arguments],
        cwd=stage.ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert shard_bytes(root) == truth[1]
    assert len(report(root)["images_per_device_second"]) <= 3  # one that comes up last may find nothing left to do


# ---------------------------------------------------------------------------------------------------- broken actors


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


def test_actors_that_fit_nowhere_are_refused_before_anything_is_written(connected, truth, tmp_path):
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


def test_a_teacher_that_loads_nowhere_ends_the_run(connected, tmp_path):
    executor = RayExecutor(partial(workers.NodeWithoutTeacher, tmp_path), PairsRuntime(actors=2))
    with pytest.raises(RunStopped, match="no actor can load what it needs: nothing at"):
        run_shards(executor, range(20))
    executor.close()


# ------------------------------------------------------------------------------------------------------- full disk


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "600k") as folder:
        yield folder


def test_a_full_disk_stops_with_a_clear_message_and_keeps_every_commit(truth, head, disk, tmp_path):
    root = disk / "root"
    done = stage.run(*generate(truth, root, "--layout.samples_per_shard", 8), ray_address=head.address)
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "every committed shard is intact" in done.stderr
    assert "Traceback" not in done.stderr
    committed = [json.loads(record) for record in files(root / "commits").values()]
    assert committed
    verified = stage.run("verify_shards", root)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    # On a larger disk the same command finishes the rest.
    shutil.copytree(root, tmp_path / "larger")
    done = stage.run(
        *generate(truth, tmp_path / "larger", "--layout.samples_per_shard", 8, "--runtime.executor", "in-process")
    )
    assert done.returncode == 0, done.stderr
    assert report(tmp_path / "larger")["shards_committed"] == NUM_SHARDS // 2 - len(committed)
