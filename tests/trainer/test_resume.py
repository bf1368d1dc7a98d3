"""A run that was interrupted is the run that was not, to the last bit; also with two processes."""

import shutil
import signal

import pytest
import torch
from support.patience import PATIENCE_S
from support.processes import kill_tree, start_trainer, wait_for
from support.training import metrics, tensors, train_config, train_settings, write_config

from trainer.loop import train

RUNTIME = {"steps": 9, "checkpoint_every": 3, "keep_checkpoints": 400, "micro_batch": 2, "log_every": 1}


@pytest.fixture(scope="module")
def two_processes(trained_on, tmp_path_factory):
    """Directories of two runs of two processes each: one straight, one killed with -9 after its sixth step, and begun
    again; and a copy of what the second had when it was killed.
    """
    folder = tmp_path_factory.mktemp("two-processes")
    settings = train_settings(trained_on, folder, runtime={**RUNTIME, "workers": 1})
    config = write_config(folder / "train.yaml", settings)
    finish(start_trainer(config, folder / "straight", processes=2))
    stop_after(6, start_trainer(config, folder / "resumed", "--runtime.steps", 1000, processes=2), folder / "resumed")
    shutil.copytree(folder / "resumed", folder / "killed")
    finish(start_trainer(config, folder / "resumed", processes=2))
    return folder


def finish(process):
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err


def stop_after(step, process, run_dir):
    """Kill a run once a checkpoint is there, and take away what it made beyond."""
    wait_for(run_dir / "checkpoints" / f"step_{step:07d}", process)
    kill_tree(process)
    assert process.returncode == -signal.SIGKILL
    for later in (run_dir / "checkpoints").glob("step_*"):
        if later.name > f"step_{step:07d}":
            shutil.rmtree(later)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def lines(run_dir):
    """Metrics without what depends on the clock."""
    timed = ("time", "seconds_per_step", "images_per_second", "data_wait_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in metrics(run_dir)]


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_six_steps_and_six_are_twelve(trained_on, tmp_path, critic_steps):
    loss = {"critic_steps_per_generator_step": critic_steps}
    train(train_config(trained_on, tmp_path / "straight", loss=loss, runtime={"steps": 12}))
    for steps in (6, 12):
        train(train_config(trained_on, tmp_path / "resumed", loss=loss, runtime={"steps": steps}))
    assert_equal(tensors(tmp_path / "straight", 12), tensors(tmp_path / "resumed", 12))
    assert lines(tmp_path / "straight") == lines(tmp_path / "resumed")
    first, last = (tensors(tmp_path / "resumed", step)["student/conv_in.weight"] for step in (6, 12))
    assert not torch.equal(first, last)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(trained_on, tmp_path):
    config = write_config(tmp_path / "train.yaml", train_settings(trained_on, tmp_path, runtime=RUNTIME))
    stop_after(6, start_trainer(config, tmp_path / "killed", "--runtime.steps", 1000), tmp_path / "killed")
    for name in ("killed", "straight"):
        train(train_config(trained_on, tmp_path / name, runtime=RUNTIME))
    assert_equal(tensors(tmp_path / "straight", 9), tensors(tmp_path / "killed", 9))
    assert lines(tmp_path / "straight") == lines(tmp_path / "killed")


def test_two_processes_that_are_killed_go_on_as_if_they_had_not_been(two_processes):
    for step in (6, 9):
        assert_equal(tensors(two_processes / "straight", step), tensors(two_processes / "resumed", step))
    assert lines(two_processes / "straight") == lines(two_processes / "resumed")


def assert_close(one, two):
    """Equal up to the order of sums.

    Adam divides by the root of a second moment: where a gradient is rounding only, so is the direction of its step.
    Hence moments are compared closely, and weights within a few steps of the learning rate.
    """
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith((".exp_avg", ".exp_avg_sq", ".step")):
            torch.testing.assert_close(one[name], two[name], rtol=1e-2, atol=1e-5)
        else:
            assert (one[name] - two[name]).abs().max() < 1e-3


def test_two_processes_are_one_with_twice_the_accumulation(trained_on, tmp_path, two_processes):
    train(train_config(trained_on, tmp_path / "one", runtime={**RUNTIME, "steps": 3}))
    assert_close(tensors(tmp_path / "one", 3), tensors(two_processes / "straight", 3))
    for line, other in zip(lines(tmp_path / "one"), lines(two_processes / "straight"), strict=False):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)


def test_another_number_of_processes_goes_on_with_the_same_samples(trained_on, tmp_path, two_processes):
    shutil.copytree(two_processes / "killed", tmp_path / "mixed")
    train(train_config(trained_on, tmp_path / "mixed", runtime=RUNTIME))
    assert_close(tensors(tmp_path / "mixed", 9), tensors(two_processes / "straight", 9))
    for line, other in zip(lines(tmp_path / "mixed"), lines(two_processes / "straight"), strict=True):
        assert line == pytest.approx(other, rel=1e-2, abs=1e-4)
