"""What the demo's parts took: summed until a part is done, kept afterwards; memory of all processes at once."""

import contextlib
import os
import subprocess
import sys
import time

import psutil
import pytest
from support.patience import PATIENCE_S

from configs.errors import UserError
from pipeline import demo_record
from pipeline.demo_record import DemoRecord, DemoTimes, PeakMemory


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(demo_record.time, "monotonic", lambda: self.now)


def run(folder, clock, name, seconds, error=None):
    record = DemoRecord(folder, 2)
    with record.part(name, ["do", name], f"{name}/README.md"):
        clock.now += seconds
        if error is not None:
            raise error


def minutes(folder, name):
    page = (folder / "README.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith((f"| {name} |", f"| [{name}]"))]
    _, shown, minutes, _, done, command, _ = (cell.strip() for cell in line.split("|"))
    assert command == f"`do {name}`"
    assert shown == (name if done == "not done" else f"[{name}]({name}/README.md)")  # no link to what is not there
    return float(minutes), done


def test_the_time_of_a_part_is_that_of_all_its_runs_until_it_is_done(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, clock, "pairs", 60, KeyboardInterrupt())
    assert minutes(tmp_path, "pairs") == (1.0, "not done")
    run(tmp_path, clock, "pairs", 120)
    run(tmp_path, clock, "training", 600)
    assert minutes(tmp_path, "pairs") == (3.0, "")
    assert "Together 13.0 minutes with 2 CPUs" in (tmp_path / "README.md").read_text()


def test_a_part_that_is_done_is_not_counted_again_unless_its_work_was(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    run(tmp_path, clock, "pairs", 120)
    run(tmp_path, clock, "pairs", 6)
    assert minutes(tmp_path, "pairs") == (2.0, "")
    with pytest.raises(RuntimeError):
        run(tmp_path, clock, "pairs", 6, RuntimeError())
    assert minutes(tmp_path, "pairs") == (2.0, "")
    run(tmp_path, clock, "pairs", 180)
    assert minutes(tmp_path, "pairs") == (3.0, "")


def test_the_memory_of_a_part_is_the_most_of_its_runs(tmp_path, monkeypatch):
    def memory_of_this_process_is(size):  # earlier tests may have left a Ray cluster below this one
        monkeypatch.setattr(demo_record, "_memory", lambda process: size if process.pid == os.getpid() else 0)

    for megabytes in (900, 300):
        memory_of_this_process_is(megabytes << 20)
        run(tmp_path, Clock(monkeypatch), "pairs", 60)
    assert "| [pairs](pairs/README.md) | 1.0 | 0.9 |" in (tmp_path / "README.md").read_text()
    assert "at most 0.9 GiB" in (tmp_path / "README.md").read_text()


def test_a_damaged_record_is_begun_anew(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)
    (tmp_path / "demo.json").write_text("{")
    run(tmp_path, clock, "pairs", 60)
    times = DemoTimes.model_validate_json((tmp_path / "demo.json").read_bytes())
    assert times.parts["pairs"].seconds == 60


@pytest.mark.parametrize("below", ["", "sub", "sub/demo"])
def test_a_file_in_the_place_of_the_folder_or_of_one_above_it_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file: is a file, not a folder"):
        DemoRecord(tmp_path / "file" / below, 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_on_a_full_disk_the_word_is_the_failed_part_s(tmp_path, monkeypatch):
    def write(*args):
        raise OSError(28, "No space left on device")

    record = DemoRecord(tmp_path, 2)
    monkeypatch.setattr(record._storage, "write", write)
    with pytest.raises(RuntimeError, match="failed"), record.part("pairs", ["do"], "pairs/README.md"):
        raise RuntimeError("failed")


def test_memory_is_that_of_a_process_and_its_grandchildren(monkeypatch):
    memory = demo_record._memory

    def of_this_test(process):  # not of a Ray cluster that earlier tests may have left below this process
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or any("held = " in word for word in process.cmdline()):
                return memory(process)
        return 0

    monkeypatch.setattr(demo_record, "_memory", of_this_test)
    monkeypatch.setattr(demo_record, "_SAMPLE_EVERY_S", 0.02)
    hold = "import sys; held = b'x' * {bytes}; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold.format(bytes=100 << 20)!r}])"
    with PeakMemory() as alone:
        pass
    with (
        PeakMemory() as peak,
        subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + PATIENCE_S
        while peak.bytes < alone.bytes + (100 << 20) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.communicate()
    assert 100 << 20 < peak.bytes - alone.bytes < 200 << 20
