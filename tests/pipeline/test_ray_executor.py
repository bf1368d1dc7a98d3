"""Pair generation on a real Ray cluster, disturbed in every way a cluster can be.

The undisturbed truth is a run in this process. Whatever happens on the cluster, running the same command again must
give exactly its shards, byte for byte, and must not touch a commit that exists.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from support import stage
from support.patience import PATIENCE_S
from support.repeated import repeated
from support.small_disk import small_disk
from support.toy import files, shard_bytes, toy_config

from pipeline.generate import generate_pairs
from pipeline.ray_head import ray_head

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


def kill_actors(head):
    """kill -9 of all actors of the product below a head; returns how many there were."""
    num_killed = 0
    for process in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # some come and go
            if "ray::_Actor" in " ".join(process.cmdline()):
                process.kill()
                num_killed += 1
    return num_killed


def wait_for_workers(process, count):
    """Read a driver's progress until it speaks of so many workers, a number or a pattern."""
    assert any(re.search(f"workers {count},", line) for line in process.stdout), process.stderr.read()


def test_killed_actors_cost_at_most_their_shards(truth, head, tmp_path):
    root = tmp_path / "root"
    process = stage.start(*generate(truth, root), ray_address=head.address)
    stage.wait_for_commits(root, 1, process)
    # Whichever made it has been given more; another may still be loading, with nothing to lose.
    num_killed = kill_actors(head)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err + out
    assert shard_bytes(root) == truth[1]
    assert 1 <= report(root)["retries_by_cause"]["worker died"] <= 2 * num_killed
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
    crowded += ["--runtime.progress_period_s", 0.2]
    with repeated(lambda: (root / "lease.json").unlink(missing_ok=True), 0.01):  # as if a person broke it
        first, second = (stage.start(*generate(truth, root, *crowded), ray_address=head.address) for _ in range(2))
        # The one that comes up first waits for the other: what it has handed out is a part of the shards.
        try:
            wait_for_workers(first, "[12]")
            first.send_signal(signal.SIGSTOP)
            wait_for_workers(second, "[12]")
            first.send_signal(signal.SIGCONT)
            for process in (first, second):
                out, err = process.communicate(timeout=PATIENCE_S)
                assert process.returncode == 0, err + out
        finally:
            stage.kill(first)
            stage.kill(second)
    assert shard_bytes(root) == truth[1]
    assert sorted(files(root / "commits")) == [f"{i:06d}.json" for i in range(NUM_SHARDS)]
    events = [json.loads(line) for log in files(root / "events").values() for line in log.splitlines()]
    raced = [event for event in events if event.get("adopted") and event["device_seconds"] > 0]
    assert raced  # some shard was made twice and committed once


def test_actors_follow_a_cluster_that_grows_and_shrinks(truth, tmp_path):
    root = tmp_path / "root"
    ray = str(Path(sys.executable).with_name("ray"))
    with ray_head(num_cpus=1, num_gpus=0) as small:
        endless = ["--spec.sampler.steps", 2000, "--layout.samples_per_shard", 1, "--runtime.progress_period_s", 0.5]
        process = stage.start(*generate(truth, root, *endless), ray_address=small.address)
        try:
            wait_for_workers(process, 1)
            join = [ray, "start", "--block", f"--address={small.address}", "--num-cpus=1", "--disable-usage-stats"]
            node = subprocess.Popen(join, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
            wait_for_workers(process, 2)
            stage.kill(node)
            wait_for_workers(process, 1)
            # The one that is left works on, also at what the lost node had been given.
            num_committed = len(list((root / "commits").iterdir()))
            stage.wait_for_commits(root, min(num_committed + 3, 56), process)
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
