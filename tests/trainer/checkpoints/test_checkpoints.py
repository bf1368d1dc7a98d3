"""A checkpoint is whole or not there, and whoever goes on from one gets exactly what was saved."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from itertools import count, pairwise

import pytest
import torch
from support.small_networks import SmallRun, trainer_state

from configs.errors import RunStopped, UserError
from trainer.checkpoints.checkpoints import Checkpoints, newest_state, read_state
from trainer.checkpoints.optimizer_state import state_tensors
from trainer.checkpoints.sealed_folder import damage


def save(run_dir, run, step, *, keep=2, milestone_every=None):
    checkpoints = Checkpoints(run_dir, keep, milestone_every)
    return checkpoints.save(trainer_state(step), run.networks, run.optimizers, {"position": step}, run.config_yaml)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def trained(seed, steps):
    run = SmallRun(seed)
    run.train(range(steps))
    return run


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_loaded_is_what_was_saved_and_training_goes_on_from_it(tmp_path):
    straight, run, other = trained(0, 5), trained(0, 3), trained(9, 1)
    folder = save(tmp_path, run, 3)
    assert Checkpoints(tmp_path, 2, None).latest() == folder == tmp_path / "checkpoints/step_0000003"
    state, cursor = Checkpoints.load(folder, other.networks, other.optimizers)
    assert (state, cursor) == (trainer_state(3), {"position": 3})
    assert state == newest_state(tmp_path)
    assert (folder / "config.yaml").read_text() == run.config_yaml
    assert_equal(other.tensors(), run.tensors())
    other.train(range(3, 5))
    assert_equal(other.tensors(), straight.tensors())


def test_there_is_none_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path, 2, None)
    assert (checkpoints.latest(), newest_state(tmp_path)) == (None, None)


def test_the_latest_is_that_of_the_highest_step(tmp_path):
    run = trained(0, 1)
    for step in (9, 9_999_999, 10_000_000, 100):
        save(tmp_path, run, step, keep=9)
    (tmp_path / "checkpoints/step_0000200.tmp").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    assert Checkpoints(tmp_path, 9, None).latest().name == "step_10000000"


def test_the_latest_and_milestones_are_kept(tmp_path):
    run = trained(0, 1)
    for step in range(1, 12):
        save(tmp_path, run, step, keep=2, milestone_every=4)
    assert names(tmp_path) == [f"step_{step:07d}" for step in (4, 8, 10, 11)]


def test_what_a_killed_save_left_is_tidied_up_before_the_next(tmp_path):
    run = trained(0, 1)
    for step in (1, 2, 3):
        save(tmp_path, run, step, keep=3)
    (tmp_path / "checkpoints/step_0000004.tmp").mkdir()
    (tmp_path / "checkpoints/notes").mkdir()
    Checkpoints(tmp_path, 2, None).tidy()
    assert names(tmp_path) == ["notes", "step_0000002", "step_0000003"]


def test_a_step_keeps_the_checkpoint_it_has(tmp_path):
    run = trained(0, 1)
    folder = save(tmp_path, run, 1)
    before = (folder / "COMPLETE").stat().st_mtime_ns
    assert save(tmp_path, run, 1) == folder
    assert (folder / "COMPLETE").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------------------ death


def save_and_die(run_dir, run, step, fatal):
    """Save in a forked process that kills itself right before its ``fatal``-th change of the run directory.

    Returns:
        Whether it died; otherwise it was done before.
    """
    child = os.fork()
    if child == 0:
        seen = count(1)

        def watch(event, arguments):
            changes = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
            inside = str(run_dir) in str(arguments[0]) or event in ("os.remove", "os.rmdir")
            if changes and inside and next(seen) == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            save(run_dir, run, step, keep=1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_process_killed_anywhere_in_a_save_leaves_one_or_the_other(tmp_path):
    old, new = trained(0, 1), trained(0, 2)
    found, leftovers = [], 0
    for fatal in count(1):
        run_dir = tmp_path / f"{fatal}"
        save(run_dir, old, 1)
        died = save_and_die(run_dir, new, 2, fatal)
        leftovers += any(name.endswith(".tmp") for name in names(run_dir))
        # What has its own name is whole, also an old one that was being removed.
        assert not any(damage(run_dir / "checkpoints" / name) for name in names(run_dir) if not name.endswith(".tmp"))
        latest, loaded = Checkpoints(run_dir, 1, None).latest(), SmallRun(5)
        state, _ = Checkpoints.load(latest, loaded.networks, loaded.optimizers)
        assert_equal(loaded.tensors(), {1: old, 2: new}[state.step].tensors())
        found.append(state.step)
        save(run_dir, new, 3, keep=1)
        assert names(run_dir) == ["step_0000003"]
        if not died:
            break
    assert found == sorted(found)  # the new one is there from some moment on, for good
    assert found.count(1) > 10
    assert found.count(2) > 5  # also while the old one is being removed
    assert leftovers > 10


def test_an_error_in_a_save_leaves_nothing_behind(tmp_path, monkeypatch):
    run = trained(0, 1)
    save(tmp_path, run, 1)
    monkeypatch.setattr("trainer.checkpoints.checkpoints.state_tensors", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(tmp_path, run, 2)
    assert names(tmp_path) == ["step_0000001"]


@pytest.fixture
def one_megabyte(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("free", [0, 4096, 3 * 4096, 7 * 4096])
def test_a_full_disk_stops_the_run_and_spares_the_checkpoints_there_are(one_megabyte, free):
    run = trained(0, 1)
    save(one_megabyte, run, 1)
    available = os.statvfs(one_megabyte).f_bavail * 4096
    (one_megabyte / "ballast").write_bytes(bytes(available - free))
    with pytest.raises(
        RunStopped, match=r"step_0000002: checkpoint not written \(No space left on device\).*make room"
    ):
        save(one_megabyte, run, 2)
    assert names(one_megabyte) == ["step_0000001"]
    (one_megabyte / "ballast").unlink()
    assert Checkpoints(one_megabyte, 2, None).latest() == one_megabyte / "checkpoints/step_0000001"
    save(one_megabyte, run, 2)


# ----------------------------------------------------------------------------------------------------------- damage


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(path):
    path.write_text(path.read_text().replace('"step": 3', '"step": 9'))


DAMAGES = [
    ("student.safetensors", flip, "student.safetensors is not what was written"),
    ("student.safetensors", cut, r"student.safetensors has [\d,]+ bytes, not [\d,]+"),
    ("fake_score_optimizer.safetensors", os.remove, "fake_score_optimizer.safetensors is missing"),
    ("trainer_state.json", edit, "trainer_state.json is not what was written"),
    ("config.yaml", flip, "config.yaml is not what was written"),
    ("COMPLETE", os.remove, "COMPLETE is missing"),
    ("COMPLETE", cut, "COMPLETE is not what was written"),
]


@pytest.mark.parametrize(("name", "hurt", "problem"), DAMAGES)
def test_a_damaged_checkpoint_is_never_taken_and_the_way_on_is_named(tmp_path, name, hurt, problem):
    run_dir, run = tmp_path / "a run", trained(0, 1)
    for step in (1, 2, 3):
        newest = save(run_dir, run, step, keep=3)
    hurt(newest / name)
    checkpoints = Checkpoints(run_dir, 3, None)
    with pytest.raises(UserError) as refusal:
        checkpoints.latest()
    message = str(refusal.value)
    assert re.match(
        rf"{re.escape(str(newest))}: damaged \({problem}\); the latest whole one is step_0000002: ", message
    )
    assert "\n" not in message
    # The command does what it says.
    subprocess.run(shlex.split(re.search(r": (rm -r .*), then", message)[1]), check=True)
    assert checkpoints.latest() == newest.with_name("step_0000002")


def test_all_damaged_ones_after_the_latest_whole_one_are_named(tmp_path):
    run = trained(0, 1)
    folders = [save(tmp_path, run, step, keep=3) for step in (1, 2, 3)]
    for folder in folders[1:]:
        cut(folder / "student.safetensors")
    with pytest.raises(UserError, match=f"step_0000003: damaged.* step_0000001: rm -r {folders[2]} {folders[1]},"):
        Checkpoints(tmp_path, 3, None).latest()
    cut(folders[0] / "student.safetensors")
    all_of_them = f"{folders[2]} {folders[1]} {folders[0]} {tmp_path / 'last_checkpoint.json'}"
    with pytest.raises(UserError, match=rf"no whole one is left .*: (rm -r {all_of_them}), then") as refusal:
        Checkpoints(tmp_path, 3, None).latest()
    subprocess.run(shlex.split(re.search(r": (rm -r .*), then", str(refusal.value))[1]), check=True)
    assert Checkpoints(tmp_path, 3, None).latest() is None


def test_that_all_are_gone_is_not_taken_for_a_beginning(tmp_path):
    save(tmp_path, trained(0, 1), 7)
    (tmp_path / "last_checkpoint.json").unlink()  # as of a run from before there was such a file, or of a kill
    checkpoints = Checkpoints(tmp_path, 2, None)
    assert checkpoints.latest().name == "step_0000007"
    checkpoints.tidy()
    assert json.loads((tmp_path / "last_checkpoint.json").read_bytes()) == {"step": 7}
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"checkpoints: has no checkpoint, though last_checkpoint\.json tells of one"):
        checkpoints.latest()


@pytest.mark.parametrize(
    "change",
    [{"skipped": 0}, {"step": "three"}, {"spec": None}, {"seconds": float("inf")}],
    ids=str,
)
def test_a_state_of_another_version_is_refused(tmp_path, change):
    folder = save(tmp_path, trained(0, 1), 1)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=f"trainer_state.json: {next(iter(change))}: .*the code that wrote it"):
        read_state(folder)


def test_the_average_can_be_there_or_not(tmp_path):
    run, other = trained(0, 1), trained(4, 1)
    folder = save(tmp_path, run, 1)
    with pytest.raises(UserError, match=r"student_ema\.safetensors: missing"):
        Checkpoints.load(folder, {"student_ema": other.networks["student"]}, {})
    Checkpoints.load(folder, {"student": other.networks["student"]}, {})  # a part of it
    assert_equal(other.networks["student"].state_dict().values(), run.networks["student"].state_dict().values())


def test_each_optimizer_has_its_own_network(tmp_path):
    run = trained(0, 2)
    moments = [state_tensors(*run.optimizers[name])["inner.weight.exp_avg"] for name in ("student", "fake_score")]
    assert all(not torch.equal(a, b) for a, b in pairwise(moments))
    folder, other = save(tmp_path, run, 2), trained(1, 1)
    Checkpoints.load(folder, {}, {"fake_score": other.optimizers["fake_score"]})
    assert torch.equal(state_tensors(*other.optimizers["fake_score"])["inner.weight.exp_avg"], moments[1])
