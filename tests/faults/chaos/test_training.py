"""Training that is killed before any change of its run directory, and begun again by the same command.

It must end with what a run that nobody disturbed leaves: the same weights, moments, metrics, pictures and exports, bit
for bit, and not a file more.
"""

import random
import shutil
import signal
import time

import pytest
from faults.chaos import trainer_process
from faults.chaos.ledger import Entry
from faults.chaos.run_content import content, differing
from support.training import train_config

RUNTIME = {
    "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2, "grid_every": 2, "log_every": 1, "micro_batch": 4,
}  # fmt: skip
NUM_CHANGES = 100
"""About so many times does an undisturbed run change its directory."""
SEEDS = range(24)
ALWAYS = (0,)
"""Seeds of the schedules that every run of the tests has. Those of odd ones make a run longer that is done."""


def start(trained_on, run_dir, log, fatal=0, steps=RUNTIME["steps"]):
    config = train_config(trained_on, run_dir, runtime={**RUNTIME, "steps": steps})
    return trainer_process.start(config, log, fatal)


@pytest.fixture(scope="module")
def undisturbed(trained_on, tmp_path_factory):
    """Directories of a run that is done, and of one that was done a step earlier."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for name, steps in (("run", RUNTIME["steps"]), ("shorter", RUNTIME["steps"] - 1)):
        process = start(trained_on, folder / name, folder / "log", steps=steps)
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()
    return folder


def fatal_changes(rng):
    """One to three numbers of changes before which a process dies; later ones have less to do."""
    yield rng.randrange(1, NUM_CHANGES)
    for _ in range(rng.randrange(3)):
        yield rng.randrange(1, NUM_CHANGES // 2)


@pytest.mark.parametrize(
    "seed", [seed if seed in ALWAYS else pytest.param(seed, marks=pytest.mark.faults) for seed in SEEDS]
)
def test_killed_before_any_change_of_its_directory_it_ends_the_same(trained_on, undisturbed, ledger, tmp_path, seed):
    entry, run_dir, log = Entry("training", seed), tmp_path / "run", tmp_path / "log"
    if seed % 2:
        shutil.copytree(undisturbed / "shorter", run_dir)
    began = time.monotonic()
    for fatal in [*fatal_changes(random.Random(seed)), 0]:
        entry.commands += 1
        started = time.monotonic()
        process = start(trained_on, run_dir, log, fatal)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        if process.exitcode != 0:
            entry.injected.append("trainer")
            entry.lost_s += time.monotonic() - started
    assert process.exitcode == 0
    assert differing(content(run_dir), content(undisturbed / "run")) == []
    entry.seconds = time.monotonic() - began
    ledger.add(entry)
