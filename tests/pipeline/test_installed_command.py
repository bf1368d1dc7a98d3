"""A demo without what it runs ends in one line, and starts and leaves nothing."""

import os
import subprocess
import sys

import pytest
from support import stage
from support.patience import PATIENCE_S


@pytest.mark.parametrize(
    ("demo", "there", "extra"),
    [("demo_pairs", [], "ray"), ("demo", [], "ray"), ("demo", ["ray"], "train")],
)
def test_a_demo_without_a_command_says_what_to_install(tmp_path, demo, there, extra):
    for folder in ("bin", "tmp"):
        (tmp_path / folder).mkdir()
    python = tmp_path / "bin/python"  # finds the packages, and beside it no commands but these
    python.symlink_to(sys.executable)
    for name in there:
        (tmp_path / "bin" / name).touch()
    ended = subprocess.run(
        [python, f"stages/{demo}.py", "--output", tmp_path / "out"],
        cwd=stage.ROOT,
        env=stage.environment(PYTHONPATH=os.pathsep.join(sys.path), TMPDIR=str(tmp_path / "tmp")),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    name = {"ray": "ray", "train": "accelerate-launch"}[extra]
    expected = f"error: {name} is not installed: there is no {tmp_path}/bin/{name}; pip install 'potstill[{extra}]'\n"
    assert (ended.returncode, ended.stderr) == (2, expected)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "out").exists()
