"""A run that was interrupted is the run that was not, to the last bit; also with two processes."""

import shutil
import signal

import pytest
import torch
from support.processes import start_trainer, wait_for
from support.stage import kill
from support.training import metrics, tensors, train_config, train_settings, write_config

from trainer.loop import train


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def lines(run_dir):
    """Metrics without what depends on the clock."""
    timed = ("time", "seconds_per_step", "images_per_second", "data_wait_share")
    return [{name: value for name, value in line.items() if name not in timed} for line in metrics(run_dir)]


@pytest.mark.parametrize("critic_steps", [1, 2])
def test_twelve_steps_are_six_and_six(trained_on, tmp_path, critic_steps):
    loss = {"critic_steps_per_generator_step": critic_steps}
    train(train_config(trained_on, tmp_path / "straight", loss=loss, runtime={"steps": 12}))
    for steps in (6, 12):
        train(train_config(trained_on, tmp_path / "resumed", loss=loss, runtime={"steps": steps}))
    assert_equal(tensors(tmp_path / "straight", 12), tensors(tmp_path / "resumed", 12))
    assert lines(tmp_path / "straight") == lines(tmp_path / "resumed")
    assert not torch.equal(*(tensors(tmp_path / "resumed", step)["student/conv_in.weight"] for step in (6, 12)))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(trained_on, tmp_path, processes):
    runtime = {"steps": 12, "checkpoint_every": 3, "keep_checkpoints": 9, "workers": 1, "micro_batch": 2}
    settings = train_settings(trained_on, tmp_path, runtime=runtime)
    config = write_config(tmp_path / "train.yaml", settings)
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    process = start_trainer(config, straight, processes=processes)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err

    process = start_trainer(config, killed, processes=processes)
    wait_for(killed / "checkpoints" / "step_0000006", process)
    kill(process)
    assert process.returncode == -signal.SIGKILL
    shutil.rmtree(killed / "checkpoints" / "step_0000009", ignore_errors=True)  # if it was a little late
    shutil.rmtree(killed / "checkpoints" / "step_0000012", ignore_errors=True)
    process = start_trainer(config, killed, processes=processes)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    for step in (9, 12):
        assert_equal(tensors(straight, step), tensors(killed, step))
    assert lines(straight) == lines(killed)


def test_two_processes_are_one_with_twice_the_accumulation(trained_on, tmp_path):
    settings = train_settings(trained_on, tmp_path, runtime={"micro_batch": 2, "log_every": 1})
    config = write_config(tmp_path / "train.yaml", settings)
    process = start_trainer(config, tmp_path / "two", processes=2)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    train(train_config(trained_on, tmp_path / "one", runtime={"micro_batch": 2, "log_every": 1}))
    one, two = tensors(tmp_path / "one", 4), tensors(tmp_path / "two", 4)
    assert one.keys() == two.keys()
    # Adam divides by the root of a second moment: where a gradient is rounding only, so is the direction. Hence
    # moments and metrics are compared, and the weights within a step or two of the learning rate.
    for name in one:
        if name.endswith(".exp_avg"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
        elif name.endswith((".exp_avg_sq", ".step")):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-9)
        else:
            assert (one[name] - two[name]).abs().max() < 1e-3
    for line, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_another_number_of_processes_takes_no_sample_twice(trained_on, tmp_path):
    # One process to the sixth step, two from there: the pairs of an epoch are still each of them once.
    settings = train_settings(trained_on, tmp_path, runtime={"micro_batch": 2, "steps": 6})
    train(train_config(trained_on, tmp_path / "run", runtime={"micro_batch": 2, "steps": 6}))
    config = write_config(tmp_path / "train.yaml", settings)
    process = start_trainer(config, tmp_path / "run", "--runtime.steps", 12, processes=2)
    _, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    train(train_config(trained_on, tmp_path / "straight", runtime={"micro_batch": 2, "steps": 12}))
    mixed, straight = lines(tmp_path / "run"), lines(tmp_path / "straight")
    for line, other in zip(mixed, straight, strict=True):
        assert line == pytest.approx(other, rel=1e-3, abs=1e-5)
