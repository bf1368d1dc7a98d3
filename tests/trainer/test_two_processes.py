"""What two processes must agree on: when to stop, what the metrics are, and that a new run has its record."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny_edm
from support.patience import PATIENCE_S

from configs.schema import PromptsConfig
from pipeline.prompts import prepare_prompts

ROOT = Path(__file__).resolve().parents[2]

# Process 1 alone gets a signal, in step 3. Process r has r + 1 samples a step, each of value r. Then a new run begins,
# whose directory the main process writes late, and whose record every process reads for Weights & Biases.
SCRIPT = f"""
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
from accelerate import Accelerator
from configs.train_schema import TrainConfig
from trainer import build
from trainer.preemption import StopSignal
from trainer.tracking.metrics import Metrics

accelerator = Accelerator(cpu=True)
rank, run_dir = accelerator.process_index, Path(sys.argv[1])
metrics = Metrics(accelerator, run_dir, step=0, num_images=0, total_steps=6)
answers = []
with StopSignal() as stop:
    for step in range(1, 6):
        if step == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        metrics.add("mean", torch.full((rank + 1,), float(rank)))
        metrics.add("sometimes", torch.tensor(5.0), count=rank if step == 2 else 0)
        metrics.add_total("total", rank + 1)
        with metrics.timed("data_wait"):
            pass
        metrics.tick(step)
        answers.append(stop.should_stop(accelerator))
        if answers[-1]:
            break
values = metrics.log(step, 10 * step, step)
metrics.close()
result = [accelerator.num_processes, stop.received, answers, values]
(run_dir / f"process{{rank}}.json").write_text(json.dumps(result))

def begin_late(*arguments, begin=build.begin):
    time.sleep(1)
    begin(*arguments)

build.begin = begin_late
build.check_trackers = lambda _: None  # accelerate does without a tracker that is not installed
with build.build(TrainConfig.model_validate(json.loads(sys.argv[2]))):
    (run_dir / f"entered{{rank}}").touch()
"""


def new_run(folder):
    """The smallest run that is tracked by Weights & Biases."""
    (folder / "prompts.txt").write_text("1\n2\n")
    prepare_prompts(PromptsConfig(path=str(folder / "prompts.txt")), folder / "prompts.parquet")
    return {
        "output": str(folder / "new"),
        "teacher": {"kind": "edm", "path": str(tiny_edm.build(folder / "teacher"))},
        "data": {"prompts": str(folder / "prompts.parquet")},
        "loss": {"regression_weight": 0.0},
        "batch": {"dm": 2},
        "runtime": {"workers": 0, "trackers": ["wandb"]},
    }


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, folder / "script.py", folder, json.dumps(new_run(folder))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def results(run_dir):
    return [json.loads((run_dir / f"process{rank}.json").read_text()) for rank in range(2)]


def test_a_signal_to_one_stops_both_after_the_same_step(results):
    assert [result[:3] for result in results] == [[2, None, [False, False, True]], [2, "SIGTERM", [False, False, True]]]


def test_metrics_are_of_both_and_the_same_on_both(run_dir, results):
    assert results[0][3] == results[1][3]
    values = results[0][3]
    assert math.isclose(values["mean"], 2 / 3)  # 3 samples of value 0, 6 of value 1
    assert (values["sometimes"], values["total"]) == (5.0, 9.0)
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()  # one process writes
    assert json.loads(line)["mean"] == pytest.approx(2 / 3, rel=1e-5)


def test_a_new_run_is_entered_when_its_record_is_there(run_dir):
    assert all((run_dir / f"entered{rank}").exists() for rank in range(2))
