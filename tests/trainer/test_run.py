"""The trainer as a command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import forge
from support.processes import ROOT, start_trainer, wait_for
from support.training import make_pairs, metrics, train_settings, write_config


def config_file(folder, tmp_path, **sections):
    return write_config(tmp_path / "train.yaml", train_settings(folder, tmp_path, **sections))


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_accelerate_launches_it_and_the_same_command_again_has_nothing_to_do(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path, runtime={"steps": 2, "trackers": ["tensorboard"], "workers": 1})
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "trainer/run.py"]
    command += ["--config", config, "--output", tmp_path / "run", "--data.pairs", trained_on / "pairs"]
    for message in ("done", "nothing left to do"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert message in done.stdout
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made >= {"README.md", "curves.png", "metrics.jsonl", "export", "export_ema", "grids", "tensorboard"}
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2]


def test_sigterm_saves_between_two_steps_and_is_no_failure(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path, runtime={"steps": 100_000, "workers": 1, "log_every": 1})
    process = start_trainer(config, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert "stopped after step" in out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer_state.json").read_bytes())["step"] == metrics(tmp_path / "run")[-1]["step"]
    assert (checkpoint / "COMPLETE").exists()


def test_mistakes_are_told_all_at_once_with_code_2(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path)
    code, _, err = finish(
        start_trainer(config, tmp_path / "run", "--loss.t_min", 2, "--optimizer.lr", -1, "--batch.dmm", 3)
    )
    assert code == 2
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == ["--batch.dmm", "--loss.t_min", "--optimizer.lr"]


def test_help_needs_no_torch(tmp_path):
    code = (
        "import sys, runpy; sys.argv = ['run.py', '--help'];\n"
        "try: runpy.run_path('trainer/run.py', run_name='__main__')\n"
        "except SystemExit: print([m for m in ('torch', 'accelerate', 'ray') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--loss.regression_weight" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.fixture(scope="module")
def breakable(tmp_path_factory):
    """Pairs that a test may break, if it mends them again."""
    folder = tmp_path_factory.mktemp("breakable")
    make_pairs(folder)
    return folder


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_stops_the_run_with_its_number_and_the_repair(breakable, tmp_path, damage, workers):
    root, shard = breakable / "pairs", 3
    path = root / forge.record(root, shard)["path"]
    content = path.read_bytes()
    try:
        match damage:
            case "missing":
                path.unlink()
            case "flipped":
                path.write_bytes(forge.flip(content, len(content) // 2))
            case "cut":
                path.write_bytes(content[: len(content) // 2])
        runtime = {"steps": 40, "workers": workers, "log_every": 100}
        code, _, err = finish(start_trainer(config_file(breakable, tmp_path, runtime=runtime), tmp_path / "run"))
    finally:
        path.write_bytes(content)
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("stopped: ")]
    assert "shard 3" in line
    assert f"python stages/verify_shards.py {root} --repair" in line
    assert "Traceback" not in err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_offered(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path, runtime={"steps": 4, "checkpoint_every": 2})
    assert finish(start_trainer(config, tmp_path / "run"))[0] == 0
    newest = tmp_path / "run" / "checkpoints" / "step_0000004"
    weights = newest / "student.safetensors"
    weights.write_bytes(forge.flip(weights.read_bytes(), os.path.getsize(weights) - 1))
    code, _, err = finish(start_trainer(config, tmp_path / "run", "--runtime.steps", 6))
    assert code == 2
    assert "step_0000004" in err
    assert "step_0000002" in err
    assert f"rm -r {newest}" in err
