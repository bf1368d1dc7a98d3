"""Training under its launchers, which are told to stop, or lose a process; then the same command again.

With each seed the moments differ. The run must end with what one that nobody disturbed leaves.
"""

import os
import random
import signal
import time

import psutil
import pytest
from faults.chaos.ledger import Entry
from faults.chaos.run_content import content, differing
from support.patience import PATIENCE_S
from support.processes import kill_tree, start_trainer, wait_for
from support.training import train_settings, write_config

RUNTIME = {"steps": 10, "checkpoint_every": 1, "keep_checkpoints": 10, "micro_batch": 2, "log_every": 1}
ENDLESS = ("--runtime.steps", 1000)
LAUNCHERS = {"accelerate": {"accelerate": True}, "torchrun": {"processes": 2}}


@pytest.fixture(scope="module")
def config(trained_on, tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return write_config(folder / "train.yaml", train_settings(trained_on, folder, runtime={**RUNTIME, "workers": 1}))


@pytest.fixture(scope="module", params=LAUNCHERS)
def launched(request, config, tmp_path_factory):
    """How to start a run, and the content of one that was not disturbed."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    launcher = LAUNCHERS[request.param]
    code, _, err = ended(start_trainer(config, run_dir, **launcher))
    assert code == 0, err
    return lambda run_dir, *arguments: start_trainer(config, run_dir, *arguments, **launcher), content(run_dir)


def ended(process):
    """Exit code, output and errors; waits for all that hold them, orphans of a launcher too."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def steps_done(run_dir):
    return max((int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*[0-9]")), default=0)


def at_a_moment(rng, process, run_dir):
    """Wait for the next checkpoint but one, to begin to be written or to be there, and a little longer."""
    suffix = rng.choice(["", ".tmp"])
    step = steps_done(run_dir) + 2
    while suffix and not (run_dir / "checkpoints" / f"step_{step:07d}{suffix}").exists() and steps_done(run_dir) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    if not suffix:
        wait_for(run_dir / "checkpoints" / f"step_{step:07d}", process)
    time.sleep(rng.uniform(0, 0.05))


def ranks(launcher):
    """Trainer processes below a launcher, by rank."""
    found = {}
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if "trainer/run.py" in process.cmdline():
            found.setdefault(process.environ().get("RANK", "0"), process)
    return found


def terminate_launcher(rng, process):
    process.terminate()
    return "SIGTERM to the launcher"


def terminate_all(rng, process):
    os.killpg(process.pid, signal.SIGTERM)
    return "SIGTERM to the process group"


def kill_launcher(rng, process):
    process.kill()
    return "launcher"


def kill_one(rng, process):
    there = ranks(process)
    rank = rng.choice(sorted(there))
    there[rank].kill()
    return f"rank {rank} of {len(there)}"


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_to_a_launcher_the_run_ends_the_same(launched, ledger, tmp_path, seed):
    start, undisturbed = launched
    rng, entry, run_dir, began = random.Random(seed), Entry("launchers", seed), tmp_path / "run", time.monotonic()
    for disturb in rng.sample([terminate_launcher, terminate_all, kill_launcher, kill_one], 2):
        process = start(run_dir, *ENDLESS)
        try:
            at_a_moment(rng, process, run_dir)
            entry.injected.append(disturb(rng, process))
            entry.commands += 1
            _, out, err = ended(process)  # the trainer ends as well, and lets go of the directory
        finally:
            if process.poll() is None:
                kill_tree(process)
        if "SIGTERM" in entry.injected[-1] or disturb is kill_launcher:
            assert "; the same command goes on from there" in out, out + err
        assert steps_done(run_dir) < RUNTIME["steps"], "too late: more steps are needed"
    code, _, err = ended(start(run_dir))
    assert code == 0, err
    assert differing(content(run_dir), undisturbed) == []
    entry.commands, entry.seconds = entry.commands + 1, time.monotonic() - began
    ledger.add(entry)
