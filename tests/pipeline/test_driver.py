"""The driver's loop against an executor that does what a script says."""

import errno
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import RunStopped, UserError
from pipeline.driver import Outcome, StopRequest, drive
from pipeline.shard_maker import ShardResult
from pipeline.shards.writer import DamagedShard


class Scripted:
    """Runs shards one after the other; ``script[shard]`` lists what its attempts come to, then it succeeds."""

    num_workers = 1

    def __init__(self, script, slots=3):
        self.script = {shard: deque(events) for shard, events in script.items()}
        self.slots = slots
        self.running = deque()
        self.attempts = []

    @property
    def in_flight(self):
        return len(self.running)

    def free_slots(self, num_waiting):
        return min(num_waiting, self.slots - self.in_flight)

    def submit(self, shard, attempt):
        assert self.in_flight < self.slots
        self.attempts.append((shard, attempt))
        self.running.append(shard)

    def wait(self, timeout_s):
        if not self.running:
            return []
        shard = self.running.popleft()
        event = self.script[shard].popleft() if self.script.get(shard) else "done"
        if event == "done":
            return [Outcome(shard, "w", result=ShardResult(commit=shard, adopted=False, device_seconds=1.0))]
        return [Outcome(shard, "w", error=event, crashed=isinstance(event, ConnectionError), lost_seconds=2.0)]

    def close(self):
        pass


class Recorder:
    def __init__(self, on_commit=lambda: None):
        self.done, self.failures, self.given_up, self.on_commit = [], [], {}, on_commit

    def committed(self, outcome, result):
        self.done.append(outcome.shard)
        self.on_commit()

    def failed(self, outcome, attempt):
        self.failures.append((outcome.shard, attempt))

    def parked(self, shard, outcome, attempts, reason):
        self.given_up[shard] = (attempts, reason)

    def tick(self, executor, num_waiting):
        pass


def run(script, num_shards=5, *, recorder=None, stop=None, slots=3, errors=3, crashes=10):
    executor, recorder = Scripted(script, slots), recorder or Recorder()
    limits = {"max_errors_per_shard": errors, "max_crashes_per_shard": crashes}
    parked = drive(executor, range(num_shards), recorder, stop or StopRequest(), **limits)
    return executor, recorder, parked


ERROR, CRASH = ValueError("bad sample"), ConnectionError("node lost")


@given(
    st.dictionaries(st.integers(0, 8), st.lists(st.sampled_from([ERROR, CRASH]), max_size=14)),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 12),
)
def test_every_shard_is_committed_once_or_parked(script, slots, errors, crashes):
    _, recorder, parked = run(script, 10, slots=slots, errors=errors, crashes=crashes)
    assert sorted(recorder.done + parked) == list(range(10))
    for shard in range(10):
        events = script.get(shard, [])
        fatal = any(
            events[:n].count(ERROR) >= errors or events[:n].count(CRASH) >= crashes for n in range(len(events) + 1)
        )
        assert (shard in parked) == fatal


def test_errors_and_crashes_have_their_own_budgets():
    executor, recorder, parked = run({1: [CRASH] * 9 + [ERROR] * 2, 3: [ERROR] * 3})
    assert parked == [3]
    assert recorder.given_up[3][0] == 3
    assert "ValueError: bad sample" in recorder.given_up[3][1]
    assert sorted(recorder.done) == [0, 1, 2, 4]
    assert [attempt for shard, attempt in executor.attempts if shard == 1] == list(range(1, 13))


def full(number=errno.ENOSPC):
    return OSError(number, "No space left on device")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_stops_the_run_instead_of_parking_everything(number):
    recorder = Recorder()
    with pytest.raises(RunStopped, match=r"no space left.*every committed shard is intact"):
        run({shard: [full(number)] * 9 for shard in range(100)}, 100, recorder=recorder)
    assert recorder.given_up == {}


def test_a_disk_that_was_full_for_a_moment_does_not_stop_the_run():
    _, recorder, parked = run({shard: [full()] for shard in (0, 2, 4)}, slots=1)
    assert (sorted(recorder.done), parked) == ([0, 1, 2, 3, 4], [])


def test_a_users_mistake_met_by_a_worker_ends_the_run_at_once():
    recorder = Recorder()
    with pytest.raises(UserError, match="credentials"):
        run({3: [UserError("credentials have expired")]}, 100, recorder=recorder)
    assert (recorder.failures, recorder.given_up) == ([], {})


def test_errors_everywhere_stop_the_run_instead_of_parking_everything():
    recorder = Recorder()
    with pytest.raises(RunStopped, match=r"10 shards in a row failed on 1 workers, the last one with ValueError"):
        run({shard: [ERROR] * 9 for shard in range(100)}, 100, recorder=recorder)
    assert recorder.given_up == {}


def test_a_disk_that_returns_other_bytes_is_tried_again():
    _, recorder, parked = run({2: [DamagedShard("read back")]})
    assert (sorted(recorder.done), parked) == ([0, 1, 2, 3, 4], [])


def test_a_stop_request_finishes_what_is_in_flight_and_begins_no_more():
    stop = StopRequest()
    recorder = Recorder(on_commit=lambda: setattr(stop, "requested", True))
    executor, _, parked = run({}, 100, recorder=recorder, stop=stop)
    assert recorder.done == [shard for shard, _ in executor.attempts] == [0, 1, 2]
    assert parked == []
