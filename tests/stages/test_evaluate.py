"""evaluate.py and compare.py as a person runs them: killed and run again, and one line for a mistake."""

import json
import runpy
import sys

import pytest
import yaml
from support import evaluation, stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return evaluation.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def arguments(world, tmp_path):
    settings = evaluation.settings(world, tmp_path / "unused", latency=None, teacher_steps=[6])
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if key not in ("output", "student")}))
    return ["--config", path, "--student", world / "student"]


@pytest.fixture
def here(monkeypatch):
    """Run a script in this process, which has imported what it needs already; its exit code."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        try:
            runpy.run_path(str(stage.ROOT / f"stages/{script}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code
        return 0

    return run


def systems(output):
    return json.loads((output / "report.json").read_bytes())["systems"]


def test_killed_and_run_again_equals_straight(arguments, tmp_path, here, capsys):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = stage.start("evaluate", *arguments, "--output", killed)
    stage.wait_for_commits(killed / "images" / "teacher-6", 1, process)
    stage.kill(process)
    assert not (killed / "report.json").exists()
    for output in (killed, straight):
        assert here("evaluate", *arguments, "--output", output) == 0
        assert capsys.readouterr().out.endswith(f"open {output}/report.html\n")
    assert systems(killed) == systems(straight)

    assert here("compare", killed, straight, "--output", tmp_path / "both") == 0
    assert [system["name"] for system in systems(tmp_path / "both")] == ["teacher-6", "killed-student"]


def test_a_mistake_is_one_line(arguments, tmp_path, here, capsys):
    gone = tmp_path / "gone"
    assert here("evaluate", *arguments, "--student", gone, "--output", tmp_path / "out") == 2
    line = f"error: student: there is no folder {gone}; name a run directory, or its export\n"
    assert capsys.readouterr() == ("", line)
    assert not (tmp_path / "out").exists()
    assert here("compare", gone, "--output", tmp_path / "both") == 2
    assert capsys.readouterr().err.startswith(f"error: {gone}: no report.json; name a folder")
