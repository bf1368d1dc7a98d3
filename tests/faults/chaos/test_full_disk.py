"""Training on a disk that fills up: one line, every checkpoint intact, and with more room the same end as without.

The disk is a file system of its own, of a share of what the run needs: it fills up under the first checkpoint, a later
one, or the exports.
"""

import subprocess

import pytest
from faults.chaos import trainer_process
from faults.chaos.run_content import content, differing
from support.small_disk import small_disk
from support.training import train_config

RUNTIME = {"steps": 2, "checkpoint_every": 1, "keep_checkpoints": 2, "log_every": 1, "micro_batch": 4}
ALWAYS = 0.55
"""The share that every run of the tests tries: there is a checkpoint, and no room for the next."""


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def resize(disk, num_bytes):
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def train(trained_on, run_dir, log):
    process = trainer_process.start(train_config(trained_on, run_dir, runtime=RUNTIME), log)
    process.join()
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def undisturbed(trained_on, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, output = train(trained_on, folder / "run", folder / "log")
    assert code == 0, output
    return folder / "run"


@pytest.mark.parametrize(
    "share",
    [ALWAYS, *(pytest.param(share, marks=pytest.mark.faults) for share in (0.0005, 0.005, 0.05, 0.3, 0.8, 0.9, 0.97))],
)
def test_a_full_disk_ends_in_one_line_and_with_room_the_run_goes_on(trained_on, undisturbed, disk, tmp_path, share):
    needed = sum(path.stat().st_size for path in undisturbed.rglob("*"))
    resize(disk, int(share * needed))
    code, output = train(trained_on, disk / "run", tmp_path / "log")
    assert (code, "Traceback" in output) == (1, False), output
    (line,) = [line for line in output.splitlines() if line.startswith("stopped: ")]
    assert "No space left on device" in line
    assert "make room and run the same command again" in line
    resize(disk, 2 * needed)
    code, output = train(trained_on, disk / "run", tmp_path / "log")
    assert code == 0, output
    assert differing(content(disk / "run"), content(undisturbed)) == []
