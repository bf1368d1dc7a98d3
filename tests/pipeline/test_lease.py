import json
import os
import subprocess
import sys
import time
from itertools import count

import pytest
from support.patience import PATIENCE_S
from support.repeated import repeated

from configs.errors import RunStopped, UserError
from pipeline.lease import Lease
from pipeline.processes import process_identity
from pipeline.shards.layout import LEASE
from pipeline.shards.storage import Storage

PERIOD = 0.1
LONG = 20 * PERIOD
"""Period of whoever watches a lease that moves: it sees that soon, and does not give up first on a busy machine."""


@pytest.fixture
def storage(tmp_path):
    return Storage.open(str(tmp_path / "root"))


def test_a_second_run_is_refused_while_the_first_is_alive(storage):
    with Lease(storage, PERIOD), pytest.raises(UserError, match=f"process {os.getpid()} .* is working on this output"):
        Lease(storage, LONG).__enter__()
    assert not storage.exists(LEASE)
    with Lease(storage, PERIOD):  # free again
        pass


def foreign(storage, **about):
    record = {"id": "x", "host": "elsewhere", "pid": 1, "process": None, "period_s": PERIOD, "beat": 3} | about
    storage.write(LEASE, json.dumps(record).encode())


def alive_elsewhere(storage, every_s, **about):
    """The lease of a process on another machine, whose counter moves for as long as the context is open."""
    foreign(storage, **about)
    beats = count(4)
    return repeated(lambda: foreign(storage, **about, beat=next(beats)), every_s)


def test_a_lease_whose_counter_stands_still_is_taken_over(storage):
    foreign(storage)
    started = time.monotonic()
    with Lease(storage, PERIOD):
        assert time.monotonic() - started >= 3 * PERIOD
        assert json.loads(storage.read(LEASE))["pid"] == os.getpid()


def test_a_lease_whose_counter_moves_is_respected(storage):
    with (
        alive_elsewhere(storage, PERIOD),
        pytest.raises(UserError, match="process 1 on elsewhere is working"),
    ):
        Lease(storage, LONG).__enter__()
    assert json.loads(storage.read(LEASE))["host"] == "elsewhere"


def test_nobody_waits_for_a_process_of_this_machine_that_has_ended(storage):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = process_identity(child.pid)
    child.communicate(b"\n")
    foreign(storage, host="here", pid=child.pid, process=process)
    with Lease(storage, period_s=1e6):  # three of its periods are more than anybody's patience
        assert json.loads(storage.read(LEASE))["pid"] == os.getpid()


def test_a_slow_owner_is_given_its_own_time(storage):
    with (
        alive_elsewhere(storage, 10 * PERIOD, period_s=LONG),
        pytest.raises(UserError, match="process 1 on elsewhere is working"),
    ):
        Lease(storage, PERIOD).__enter__()


def test_the_heartbeat_outlives_storage_trouble(storage, monkeypatch):
    with Lease(storage, PERIOD):
        with monkeypatch.context() as patched:
            patched.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(UserError("access denied")))
            time.sleep(3 * PERIOD)
        before = json.loads(storage.read(LEASE))["beat"]
        deadline = time.monotonic() + PATIENCE_S
        while json.loads(storage.read(LEASE))["beat"] == before and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
        assert json.loads(storage.read(LEASE))["beat"] > before


def test_a_deleted_lease_is_taken_again(storage):
    with Lease(storage, PERIOD) as lease:
        storage.delete(LEASE)
        deadline = time.monotonic() + PATIENCE_S
        while not storage.exists(LEASE) and time.monotonic() < deadline:
            time.sleep(PERIOD / 4)
        lease.check()
        assert json.loads(storage.read(LEASE))["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id": "x"}', b"\xff\x00", b'{"period_s": "soon"}'])
def test_a_lease_that_nobody_wrote_is_named_with_the_way_on(storage, content):
    storage.write(LEASE, content)
    with pytest.raises(UserError, match=r"root/lease.json: damaged, .*; if no run does, delete it and run") as caught:
        Lease(storage, PERIOD).__enter__()
    assert "\n" not in str(caught.value)
    assert storage.read(LEASE) == content  # a run of a newer version may hold it
    storage.delete(LEASE)
    with Lease(storage, PERIOD):
        pass


def test_a_run_that_lost_its_lease_is_told_so(storage):
    with Lease(storage, PERIOD) as lease:
        lease.check()
        deadline = time.monotonic() + PATIENCE_S
        while lease._lost is None and time.monotonic() < deadline:
            foreign(storage)  # again, should a heartbeat on its way have replaced it
            time.sleep(2 * PERIOD)
        with pytest.raises(RunStopped, match="process 1 on elsewhere has taken this output over"):
            lease.check()
    assert json.loads(storage.read(LEASE))["host"] == "elsewhere"  # not ours to delete
