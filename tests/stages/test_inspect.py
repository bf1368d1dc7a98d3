"""verify_shards.py and status.py as a person runs them: exit codes, and one line instead of a traceback."""

import json
import runpy
import shutil
import sys

import pytest
from support import stage
from support.forge import flip, record, rewrite
from support.toy import toy_config

from pipeline.generate import generate_pairs


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    generate_pairs(toy_config(folder / "root", folder))
    return folder / "root"


@pytest.fixture
def root(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "root")


def judge(code, line, found, out, err):
    assert found == code, err
    if code == 0:
        assert (line in out, err) == (True, "")
    else:
        assert err.count("\n") == 1, err
        assert err.startswith("error: " if code == 2 else "stopped: ")
        assert line in err


@pytest.fixture
def expect(monkeypatch, capsys):
    """Run a script in this process, which has imported what it needs already, and judge its end."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(code, line, script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        found = 0
        try:
            runpy.run_path(str(stage.ROOT / f"stages/{script}.py"), run_name="__main__")
        except SystemExit as end:
            found = end.code
        judge(code, line, found, *capsys.readouterr())

    return run


def test_as_processes(root):
    done = stage.run("status", root)
    judge(0, "sealed: complete", done.returncode, done.stdout, done.stderr)
    (root / "commits/000002.json").write_text("{")
    done = stage.run("verify_shards", root, "--deep", 4, "--gc")
    judge(1, "--gc deleted nothing", done.returncode, done.stdout, done.stderr)


def test_a_whole_dataset(root, expect):
    expect(0, "5 of 5 shards whole, 40 pairs", "verify_shards", root, "--deep", 4, "--gc", "--repair")
    expect(0, "sealed: complete", "status", root)


def test_the_users_mistakes(root, tmp_path, expect):
    expect(2, "no run.json", "verify_shards", tmp_path)
    expect(2, "no run.json", "status", tmp_path)
    run = json.loads((root / "run.json").read_bytes())
    run["spec"]["format_version"] = 9
    (root / "run.json").write_text(json.dumps(run))
    expect(2, "format_version is 9", "status", root)


def test_a_damaged_commit_record(root, expect):
    (root / "commits/000002.json").write_text("{")
    expect(1, "commits/000002.json: not a commit record", "status", root)
    expect(1, "1 problems", "verify_shards", root)
    expect(1, "--gc deleted nothing", "verify_shards", root, "--gc")
    expect(0, "withdrew 1 damaged shards", "verify_shards", root, "--repair")
    expect(0, "1 shards to make", "status", root)


def test_a_damaged_shard_and_deep(root, expect):
    rewrite(root, lambda data: flip(data, 1200))
    (root / record(root, 3)["index_path"]).unlink()
    expect(1, "2 problems", "verify_shards", root, "--deep", 4)


def test_a_damaged_seal(root, expect):
    (root / "SEALED.json").write_text("{")
    expect(1, "SEALED.json: not JSON", "status", root)
    expect(1, "1 problems", "verify_shards", root)
    (root / "run.json").write_text("{")
    expect(1, "run.json: ", "verify_shards", root)
