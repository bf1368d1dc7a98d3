"""Training that is killed at any change of its run directory, or at any moment, and begun again by the same command.

It must end with what a run that nobody disturbed leaves: the same weights, moments, metrics, pictures and exports, bit
for bit, and not a file more.
"""

import json
import random
import signal
import time

import pytest
from faults.chaos import trainer_process
from faults.chaos.ledger import Entry
from support.toy import files
from support.training import metrics, train_config

RUNTIME = {
    "steps": 3, "checkpoint_every": 1, "keep_checkpoints": 2, "grid_every": 2, "log_every": 1, "micro_batch": 4,
}  # fmt: skip
NUM_CHANGES = 84
"""Changes of the run directory in an undisturbed run; the test of that name keeps this number right."""
SEEDS = range(30)
ALWAYS = (0, 1)
"""Seeds of the schedules that every run of the tests has."""


def config_of(trained_on, run_dir):
    return train_config(trained_on, run_dir, runtime=RUNTIME)


@pytest.fixture(scope="module")
def undisturbed(trained_on, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = trainer_process.start(config_of(trained_on, folder / "run"), folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return folder / "run"


def content(run_dir):
    """All that a run leaves, but for what depends on the clock and on where it lies."""
    timed = ("time", "seconds_per_step", "images_per_second", "data_wait_share")
    found = {name: data for name, data in files(run_dir).items()}
    for name in found:
        if name.endswith((".yaml", ".md", ".jsonl", "COMPLETE", "trainer_state.json", "run.json", "curves.png")):
            found[name] = b""
    lines = [{key: value for key, value in line.items() if key not in timed} for line in metrics(run_dir)]
    return {**found, "metrics.jsonl": json.dumps(lines).encode()}


def differing(a, b):
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def survive(trained_on, folder, entry, kill):
    """Run the command until it succeeds; ``kill`` says, for each start, before which change it dies, or does it."""
    began = time.monotonic()
    while True:
        entry.commands += 1
        started, log = time.monotonic(), folder / f"log-{entry.commands}"
        process = kill(lambda fatal=0: trainer_process.start(config_of(trained_on, folder / "run"), log, fatal))
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        entry.injected.append("trainer")
        entry.lost_s += time.monotonic() - started
    entry.seconds = time.monotonic() - began


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "seed", [seed if seed in ALWAYS else pytest.param(seed, marks=pytest.mark.faults) for seed in SEEDS]
)
def test_killed_before_any_change_of_its_directory_it_ends_the_same(trained_on, undisturbed, ledger, tmp_path, seed):
    rng, entry = random.Random(seed), Entry("training", seed)
    fatal = [rng.randrange(1, NUM_CHANGES + 1), *(rng.randrange(1, NUM_CHANGES // 2) for _ in range(rng.randrange(3)))]
    survive(trained_on, tmp_path, entry, lambda start: start(fatal.pop(0) if fatal else 0))
    assert differing(content(tmp_path / "run"), content(undisturbed)) == []
    assert entry.injected
    ledger.add(entry)
