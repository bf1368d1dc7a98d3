"""What two processes must agree on: when to stop, and what the metrics are."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support.patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]

# Process 1 alone gets a signal, in step 3. Process r has r + 1 samples a step, each of value r.
SCRIPT = f"""
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import torch
from accelerate import Accelerator
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
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, folder / "script.py", folder]
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
