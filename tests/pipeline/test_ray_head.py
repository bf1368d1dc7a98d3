"""What a Ray head of one's own is started with."""

import subprocess

import pytest

from pipeline.ray_head import ray_head


def test_its_jobs_and_actors_have_the_variables_that_were_asked_for_and_no_other_cluster(monkeypatch):
    seen = {}

    def start(command, *, env, **_):
        seen.update(env)
        raise RuntimeError("not started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("ONE", "of this process")
    with pytest.raises(RuntimeError, match="not started"), ray_head(1, environment={"TWO": "of the caller"}):
        pass
    assert (seen["ONE"], seen["TWO"]) == ("of this process", "of the caller")
    assert "RAY_ADDRESS" not in seen
