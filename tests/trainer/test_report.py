"""The page about a run says what lies in its directory, at whatever point the run ended."""

import io
import re

import numpy as np
import pytest
from PIL import Image
from support.small_networks import SmallRun, train_config, train_spec, trainer_state

from configs.errors import UserError
from trainer import curves
from trainer.checkpoints.checkpoints import Checkpoints
from trainer.curves import draw_curves
from trainer.report import write_report
from trainer.run_directory import begin
from trainer.tracking.metrics_file import MetricsFile


@pytest.fixture
def config(tmp_path):
    data = {"mix": [{"pairs": "s3://bucket/pairs", "weight": 2.0}, {"pairs": "/more"}], "holdout": 7}
    teacher = {"kind": "stable_diffusion", "path": "/models/sd"}
    student = {"ema_decay": 0.999}
    return train_config(str(tmp_path), teacher=teacher, data=data, student=student, runtime={"steps": 300})


@pytest.fixture
def run_dir(tmp_path, config):
    """A run that has just begun."""
    begin(tmp_path, config, train_spec(config))
    return tmp_path


def train(run_dir, config, step):
    """Leave what a run leaves that has got to ``step``."""
    file = MetricsFile(run_dir, 0)
    for number in range(50, step + 1, 50):
        values = {"loss/student": 10 / number, "grad_norm/student": float("nan"), "loss/dm": 1.0}
        file.append(number, 128 * number, number, values)
    run, state = SmallRun(0), trainer_state(step, config)
    Checkpoints(run_dir, 2, None).save(state, run.networks, run.optimizers, {}, run.config_yaml)
    (run_dir / "grids").mkdir()
    for number in (0, 100, 9, step):
        (run_dir / f"grids/step_{number:07d}.png").write_bytes(b"")


def page(run_dir):
    write_report(run_dir)
    return (run_dir / "README.md").read_text()


def cells(text, row):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_run_that_has_only_begun(run_dir):
    text = page(run_dir)
    assert "No checkpoint has been written yet; 300 steps are planned." in text
    assert "it begins anew" in text
    assert "No line of metrics has been written yet." in text
    assert not (run_dir / "curves.png").exists()


def test_a_run_that_stopped_early(run_dir, config):
    train(run_dir, config, 200)
    text = page(run_dir)
    assert "Not finished: the last checkpoint is of step 200 of 300." in text
    assert "it goes on after step 200." in text
    assert "export" not in text


def test_a_finished_run(run_dir, config):
    train(run_dir, config, 300)
    (run_dir / "export_ema").mkdir()
    (run_dir / "export").mkdir()
    text = page(run_dir)
    assert "Finished after 300 steps." in text
    assert "with a larger `--runtime.steps`" in text
    assert cells(text, "loss/student") == ["0.2", "0.03333", "what the student minimizes"]
    assert cells(text, "grad_norm/student")[:2] == ["", ""]
    assert cells(text, "learnt from") == ["38,400 samples in 300 steps"]
    assert cells(text, "student") == ["timestep: last of the schedule; average of weights: decay 0.999 per step"]
    assert cells(text, "s3://bucket/pairs") == ["2", f"`{'f' * 16}`", f"`{'c' * 16}`"]
    assert cells(text, "/more") == ["1", f"`{'f' * 16}`", f"`{'c' * 16}`"]
    assert "1,000 pairs are trained on, 7 of each dataset are kept out." in text
    assert 'from_pretrained("export_ema")' in text
    linked = re.findall(r"\]\((.+?)\)", text)
    assert linked == ["grids/step_0000300.png", "curves.png", "export/README.md", "export_ema/README.md"]


def test_the_page_is_a_function_of_what_lies_there(run_dir, config):
    train(run_dir, config, 100)
    write_report(run_dir)
    first = (run_dir / "README.md").read_text()
    assert page(run_dir) == first


def test_regression_alone_has_no_critic_and_no_pairs_no_table(tmp_path):
    for loss, absent, present in (
        ({"dm_weight": 0, "regression": "l2"}, ("distribution matching", "critic"), "/pairs"),
        ({"regression_weight": 0}, ("regression on pairs", "/pairs", " l2 "), "No pairs."),
    ):
        folder = tmp_path / present.strip("/.")
        config = train_config(str(folder), loss=loss)
        spec = train_spec(config)
        if "regression_weight" in loss:
            spec = spec.model_copy(update={"data": ()})
        begin(folder, config, spec)
        text = page(folder)
        assert present in text
        about = re.sub(r"\| batch \|.*", "", text)
        assert not any(word in about for word in absent)


def test_what_a_run_began_with_is_named(tmp_path, config):
    assert cells(_about(tmp_path / "first", config, None), "begun as") == ["the teacher"]
    going_on = config.model_copy(update={"init_from": "/runs/first"})
    text = _about(tmp_path / "second", going_on, "d" * 64)
    assert cells(text, "begun as") == [f"the student of /runs/first, `{'d' * 64}`"]


def _about(run_dir, config, init_digest):
    begin(run_dir, config, train_spec(config).model_copy(update={"init_digest": init_digest}))
    return page(run_dir)


def test_a_damaged_file_of_metrics_is_named(run_dir):
    (run_dir / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        write_report(run_dir)


# --------------------------------------------------------------------------------------------------------- curves


def lines(num, **values):
    return [{"step": 10 * i, **{name: value(i) for name, value in values.items()}} for i in range(1, num + 1)]


def drawn(monkeypatch, metrics):
    """Title -> axes, of all panels; the picture has been drawn too."""
    axes, draw = {}, curves._draw

    def keep(ax, panel, *arguments):
        draw(ax, panel, *arguments)
        axes[panel.title] = ax

    monkeypatch.setattr(curves, "_draw", keep)
    picture = np.asarray(Image.open(io.BytesIO(draw_curves(metrics))).convert("RGB"))
    assert (picture[0, 0] == 255).all()  # a light ground
    assert (picture.min(axis=2) < 128).any()
    return axes


def test_a_panel_for_what_there_is(monkeypatch):
    metrics = lines(4, **{"loss/critic": lambda i: i, "images_per_second": lambda i: 40.0, "loss/dm": lambda i: None})
    axes = drawn(monkeypatch, metrics)
    assert set(axes) == {"loss of the critic", "images per second"}
    (line,) = axes["loss of the critic"].lines
    assert (line.get_xdata() == [10, 20, 30, 40]).all()
    assert (line.get_ydata() == [1, 2, 3, 4]).all()
    assert axes["images per second"].get_ylim()[0] == 0


def test_values_now_and_then_are_joined_and_nulls_are_gaps(monkeypatch):
    metrics = lines(6, **{"loss/regression": lambda i: None if i == 3 else 1.0})
    for number in (0, 5):
        metrics[number]["loss/student"] = 2.0
    axes = drawn(monkeypatch, metrics)
    student, regression = axes["loss of the student"].lines
    assert list(student.get_xdata()) == [10, 60]
    assert np.isnan(regression.get_ydata()).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("value", "scale"),
    [(lambda i: 10.0**i, "log"), (lambda i: 1.0 + i, "linear"), (lambda i: i - 1.0, "linear")],
)
def test_a_logarithmic_axis_where_values_span_a_factor_of_ten(monkeypatch, value, scale):
    axes = drawn(monkeypatch, lines(4, **{"loss/critic": value}))
    assert axes["loss of the critic"].get_yscale() == scale


def test_long_runs_are_drawn_with_their_running_median(monkeypatch):
    def value(i):
        return None if i == 100 else 5.0 if i % 2 else 1.0 * i

    axes = drawn(monkeypatch, lines(200, **{"loss/critic": value}))
    every, median = (np.asarray(line.get_ydata(), dtype=float) for line in axes["loss of the critic"].lines)
    assert every[:4].tolist() == [5, 2, 5, 4]
    window = 11
    for at in (0, 3, 50, 99, 101, 199):
        around = every[max(0, at - window // 2) : at + window // 2 + 1]
        expected = np.nan if np.isnan(every[at]) else np.median(around[~np.isnan(around)])
        np.testing.assert_equal(median[at], expected)
