"""One finished evaluation for the folder's tests to look at, or to copy and spoil."""

import pytest
from support import evaluation

from pipeline.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return evaluation.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """Plots are half the time of an evaluation this small. Those of ``finished`` are drawn, and looked at."""
    monkeypatch.setattr("pipeline.evaluation.report.draw_quality", lambda systems: None)


@pytest.fixture(scope="session")
def finished(world, tmp_path_factory):
    """Of teachers with 3 steps and 1, and a student."""
    output = tmp_path_factory.mktemp("finished") / "tiny"
    evaluate(evaluation.config(world, output))
    return output
