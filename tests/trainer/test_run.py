"""The trainer as a command: exit codes, messages, signals, and what lies there afterwards."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import forge
from support.patience import PATIENCE_S
from support.processes import ROOT, start_trainer, wait_for
from support.training import make_pairs, metrics, train_config, train_settings, write_config

from configs.errors import RunStopped, UserError
from trainer.loop import train


def config_file(folder, tmp_path, **sections):
    return write_config(tmp_path / "train.yaml", train_settings(folder, tmp_path, **sections))


def finish(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def test_accelerate_launches_it(trained_on, tmp_path, capsys):
    config = config_file(trained_on, tmp_path, runtime={"steps": 2, "trackers": ["tensorboard"], "workers": 1})
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--cpu", "trainer/run.py"]
    command += ["--config", config, "--output", tmp_path / "run", "--data.pairs", trained_on / "pairs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made >= {"README.md", "curves.png", "metrics.jsonl", "export", "export_ema", "grids", "tensorboard"}
    assert [line["step"] for line in metrics(tmp_path / "run")] == [2]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "export").rglob("*")}
    train(train_config(trained_on, tmp_path / "run", runtime={"steps": 2}))
    assert "nothing left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "export").rglob("*")} == before


def test_a_run_that_was_killed_before_it_exported_is_finished_by_the_same_command(trained_on, tmp_path, capsys):
    config = train_config(trained_on, tmp_path / "run", runtime={"steps": 1})
    train(config)
    page = tmp_path / "run" / "README.md"
    for lost in (page, tmp_path / "run" / "export"):
        shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    train(config)
    assert page.exists()
    card = tmp_path / "run" / "export_ema" / "README.md"
    os.utime(card, ns=(0, 0))  # as if it were that of an earlier checkpoint
    train(config)
    assert card.stat().st_mtime_ns > 0
    assert (tmp_path / "run" / "export" / "model_index.json").exists()
    os.utime(page, ns=(0, 0))  # as if it were that of an earlier end, and the kill had come right after the exports
    train(config)
    assert page.stat().st_mtime_ns > 0
    assert "nothing left to do" not in capsys.readouterr().out


def test_sigterm_saves_between_two_steps_and_is_no_failure(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path, runtime={"steps": 100_000, "workers": 1, "log_every": 1})
    process = start_trainer(config, tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 0, err
    assert "stopped by SIGTERM after step" in out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert json.loads((checkpoint / "trainer_state.json").read_bytes())["step"] == metrics(tmp_path / "run")[-1]["step"]
    assert (checkpoint / "COMPLETE").exists()


def test_mistakes_are_told_all_at_once_with_code_2(trained_on, tmp_path):
    config = config_file(trained_on, tmp_path)
    mistakes = ["--loss.t_min", 2, "--optimizer.lr", -1, "--batch.dmm", 3]
    code, _, err = finish(start_trainer(config, tmp_path / "run", *mistakes))
    assert code == 2
    assert sorted(line.split(": ")[1] for line in err.splitlines()) == ["--batch.dmm", "--loss.t_min", "--optimizer.lr"]
    assert not (tmp_path / "run").exists()


def test_help_needs_no_torch():
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


@pytest.fixture
def broken_shard(breakable):
    """Break shard 3 in some way; it is mended afterwards."""
    path = breakable / "pairs" / forge.record(breakable / "pairs", 3)["path"]
    content = path.read_bytes()

    def break_it(damage):
        match damage:
            case "missing":
                path.unlink()
            case "flipped":
                path.write_bytes(forge.flip(content, len(content) // 2))
            case "cut":
                path.write_bytes(content[: len(content) // 2])

    yield break_it
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut"])
def test_a_damaged_shard_stops_the_run_with_its_number_and_the_repair(breakable, broken_shard, tmp_path, damage):
    broken_shard(damage)
    with pytest.raises(RunStopped, match=r"shard 3.*verify_shards\.py .*pairs --repair"):
        train(train_config(breakable, tmp_path / "run", runtime={"steps": 40, "log_every": 100}))


def test_so_it_does_on_the_command_line_in_one_line(breakable, broken_shard, tmp_path):
    broken_shard("flipped")
    runtime = {"steps": 40, "workers": 1, "log_every": 100}
    code, _, err = finish(start_trainer(config_file(breakable, tmp_path, runtime=runtime), tmp_path / "run"))
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("stopped: ")]
    assert "shard 3" in line
    assert f"python stages/verify_shards.py {breakable / 'pairs'} --repair" in line
    assert "Traceback" not in err


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_offered(trained_on, tmp_path):
    train(train_config(trained_on, tmp_path / "run", runtime={"steps": 4, "checkpoint_every": 2}))
    newest = tmp_path / "run" / "checkpoints" / "step_0000004"
    weights = (newest / "student.safetensors").read_bytes()
    (newest / "student.safetensors").write_bytes(forge.flip(weights, len(weights) - 1))
    with pytest.raises(UserError, match=f"step_0000004.*student.*step_0000002.*rm -r {newest}"):
        train(train_config(trained_on, tmp_path / "run", runtime={"steps": 6}))
