"""What a run tells about itself: the lines of metrics.jsonl, the line on the screen, and the trackers."""

import json
import math
import time

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from support.small_networks import train_config

from configs.errors import UserError
from trainer.tracking import trackers
from trainer.tracking.metrics import Metrics
from trainer.tracking.metrics_file import MetricsFile, last_metrics, read_metrics
from trainer.tracking.progress_line import ProgressLine
from trainer.tracking.trackers import check_trackers, flatten, start_trackers


class Clock:
    """Stands still unless told."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


# ------------------------------------------------------------------------------------------------------ log lines


def test_a_line_is_about_the_steps_since_the_one_before(tmp_path, clock, accelerator):
    metrics = Metrics(accelerator, tmp_path, step=100, num_images=6400, total_steps=200)
    for step, loss in ((101, 1.0), (102, 2.0)):
        metrics.add("loss/student", torch.tensor(loss))
        with metrics.timed("data_wait"):
            clock.now += 1
        clock.now += 4
        metrics.tick(step)
    first = metrics.log(102, 6528, 204)
    metrics.add("loss/student", torch.tensor(7.0))
    clock.now += 2
    second = metrics.log(103, 6592, 206)
    assert first == {
        "loss/student": 1.5,
        "images_per_second": 12.8,
        "seconds_per_step": 5.0,
        "data_wait_share": 0.2,
    }
    assert second == {"loss/student": 7.0, "images_per_second": 32.0, "seconds_per_step": 2.0}
    lines = read_metrics(tmp_path)
    assert [line.pop("time")[-6:] for line in lines] == ["+00:00"] * 2
    assert lines == [
        {"step": 102, "images": 6528, "critic_steps": 204, **first},
        {"step": 103, "images": 6592, "critic_steps": 206, **second},
    ]


def test_time_counts_when_the_body_raises(tmp_path, clock, accelerator):
    metrics = Metrics(accelerator, tmp_path, step=0, num_images=0, total_steps=2)

    def wait():
        with metrics.timed("data_wait"):
            clock.now += 3
            raise StopIteration

    with pytest.raises(StopIteration):
        wait()
    clock.now += 1
    assert metrics.log(1, 1, 1)["data_wait_share"] == 0.75


def test_what_is_not_finite_is_null_and_counted(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.append(1, 10, 1, {"a": math.nan, "b": -math.inf, "c": 1 / 3})
    file.append(2, 20, 2, {"a": 1e-30, "b": 12345678.0})
    first, second = ((tmp_path / "metrics.jsonl").read_text()).splitlines()
    assert json.loads(first, parse_constant=pytest.fail)["a"] is None
    first, second = read_metrics(tmp_path)
    assert (first["b"], first["c"], first["nonfinite_metrics"]) == (None, 0.333333, 2)
    assert (second["a"], second["b"], "nonfinite_metrics" in second) == (1e-30, 12345700.0, False)


def test_the_last_metrics_are_the_finite_ones(tmp_path):
    assert last_metrics(tmp_path) == {}
    file = MetricsFile(tmp_path, 0)
    file.append(1, 10, 1, {"loss/student": 2.0, "loss/dm": 3.0})
    file.append(2, 20, 2, {"loss/student": 0.5, "loss/dm": math.nan})
    assert last_metrics(tmp_path) == {"loss/student": 0.5}


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (49, 0), (50, 1), (120, 2), (150, 3), (999, 3)])
@pytest.mark.parametrize("torn", ["", '{"step": 200, "ima', "\xff"])
def test_steps_that_are_done_again_lose_their_lines(tmp_path, step, kept, torn):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": number, "loss": 0.1}) + "\n" for number in (50, 100, 150)]
    path.write_bytes("".join(lines).encode() + torn.encode("latin-1"))
    assert len(read_metrics(tmp_path)) == 3
    file = MetricsFile(tmp_path, step)
    assert path.read_text() == "".join(lines[:kept])
    file.append(1000, 1, 1, {})
    assert [line["step"] for line in read_metrics(tmp_path)] == [*[50, 100, 150][:kept], 1000]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["", "[1]", "{}", '{"step": "1"}', '{"step": 1'])
def test_a_line_that_is_none_is_named_and_not_lost(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl: .* is not a line of metrics"):
        MetricsFile(tmp_path, 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


# ------------------------------------------------------------------------------------------------------- progress

VALUES = {
    "images_per_second": 38.25,
    "loss/student": 0.12345,
    "loss/critic": 0.5,
    "grad_norm/student": 1.5,
    "grad_norm/critic": 0.25,
    "data_wait_share": 0.02,
    "seconds_per_step": 2.0,
}


def test_a_line_every_ten_seconds(clock, capsys):
    progress = ProgressLine(0, 10_000)
    clock.now += 9
    progress.tick(3)
    assert capsys.readouterr().out == ""
    clock.now += 1
    progress.tick(4)
    assert capsys.readouterr().out == "step 4/10,000 (0%) | ETA 6:56:30\n"
    progress.show(VALUES)
    clock.now += 9
    progress.tick(1250)
    assert capsys.readouterr().out == ""
    clock.now += 2
    progress.tick(1300)
    assert capsys.readouterr().out == (
        "step 1,300/10,000 (13%) | 38.2 images/s | loss student 0.1235, critic 0.5 | "
        "gradient norm 1.5, 0.25 | data wait 2% | ETA 4:50:00\n"
    )
    progress.tick(1301)
    progress.close()
    assert capsys.readouterr().out.startswith("step 1,301/10,000 ")
    progress.close()
    assert capsys.readouterr().out == ""


def test_without_a_critic_the_line_speaks_of_none(clock, capsys):
    progress = ProgressLine(0, 10)
    progress.show({name: value for name, value in VALUES.items() if "critic" not in name})
    clock.now += 10
    progress.tick(1)
    assert " | loss student 0.1235 | gradient norm 1.5 | " in capsys.readouterr().out


def test_on_a_terminal_there_is_a_bar_instead(monkeypatch, clock, capsys):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = ProgressLine(20, 100)
    progress.show(VALUES)
    clock.now += 100
    progress.tick(25)
    progress.say("a grid has been drawn")
    progress.close()
    shown = capsys.readouterr()
    assert shown.out == "a grid has been drawn\n"
    assert "25/100" in shown.err
    assert "38.2 images/s | loss student 0.1235, critic 0.5 | gradient norm 1.5, 0.25 | data wait 2%" in shown.err


# ------------------------------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    config = train_config("/run", runtime={"trackers": ["tensorboard", "wandb"]})
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(UserError, match=r"runtime\.trackers: wandb is not installed; pip install wandb, "):
        check_trackers(config)
    check_trackers(train_config("/run"))


def test_a_configuration_is_flat_for_trackers():
    flat = flatten(train_config("/run").model_dump(mode="json"))
    assert {type(value) for value in flat.values()} <= {int, float, str, bool}
    assert (flat["loss.dm_weight"], flat["runtime.compile"], flat["teacher.kind"]) == (1.0, False, "mixture")
    assert (flat["optimizer.betas"], flat["student.ema_decay"]) == ("[0.9, 0.999]", "null")


def test_tensorboard_gets_the_lines_and_forgets_steps_that_are_done_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(step, steps, offset):
        project = ProjectConfiguration(project_dir=tmp_path, logging_dir=str(tmp_path / "tensorboard"))
        accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_config=project)
        start_trackers(accelerator, train_config("/run"), step)
        metrics = Metrics(accelerator, tmp_path, step=step, num_images=0, total_steps=9)
        for number in steps:
            metrics.add("loss/student", torch.tensor(float(number + offset)))
            metrics.add("nowhere", math.nan)
            metrics.log(number, number, number)
        accelerator.end_training()

    run(0, (1, 2, 3, 4), 0)
    run(2, (3,), 10)
    events = EventAccumulator(str(tmp_path / "tensorboard/potstill")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/student")] == [(1, 1.0), (2, 2.0), (3, 13.0)]
    assert {"images", "critic_steps", "seconds_per_step"} <= set(events.Tags()["scalars"])
    assert "nowhere" not in events.Tags()["scalars"]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
