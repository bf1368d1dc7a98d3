"""The script prepare_prompts.py, as a person runs it."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.patience import PATIENCE_S

SCRIPT = str(Path(__file__).parents[2] / "stages/prepare_prompts.py")


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int | str | None, str, str]]:
    """Run the script in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def start(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments])
        code = 0
        try:
            runpy.run_path(SCRIPT, run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return start


def test_make_again_and_refuse(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a cat\n\na  cat\na dog\n")
    (tmp_path / "prompts.yaml").write_text("prompts:\n  path: in.txt\n")
    code, output, errors = run("--config", "prompts.yaml", "--output", "prompts.parquet")
    assert (code, errors) == (0, "")
    assert pq.read_table(tmp_path / "prompts.parquet")["prompt"].to_pylist() == ["a cat", "a dog"]
    counts = dict(line.split() for line in output.splitlines() if len(line.split()) == 2)
    expected = {"read": "4", "dropped": "2", "empty": "1", "duplicate": "1", "kept": "2"}
    assert {name: counts[name] for name in expected} == expected
    assert len(counts["digest"]) == 64

    code, output, _ = run("--prompts.path", "in.txt", "--output", "prompts.parquet")
    assert code == 0
    assert "prompts.parquet is there already with the same prompts: nothing to do" in output

    code, output, errors = run("--config", "prompts.yaml", "--output", "prompts.parquet", "--prompts.limit", "1")
    assert (code, output) == (2, "")
    assert errors.startswith("error: prompts.parquet: exists and does not hold these prompts")
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "prompts.parquet", "prompts.yaml"]


def test_help_needs_no_heavy_library_and_no_repository_on_the_path(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPT, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert result.returncode == 0
    assert "--prompts.path" in result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "pydantic" in imported
    assert not imported & {"pyarrow", "numpy", "torch", "ray", "obstore"}
