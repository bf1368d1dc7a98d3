import threading

import pytest
from support.patience import PATIENCE_S

from pipeline.shards.parallel import parallel_map


def test_results_come_in_order_and_few_are_under_way():
    started, taken = [], []

    def items():
        for i in range(50):
            assert i - len(taken) <= 2 * 3
            started.append(i)
            yield i

    for result in parallel_map(lambda i: i * i, items(), 3):
        taken.append(result)
    assert started == list(range(50))
    assert taken == [i * i for i in range(50)]


def test_several_are_under_way_at_once():
    barrier = threading.Barrier(3, timeout=PATIENCE_S)
    assert len(list(parallel_map(lambda _: barrier.wait(), range(3), 3))) == 3


def test_the_first_error_ends_it_and_what_waits_is_dropped():
    release, calls = threading.Event(), []

    def fail(i):
        calls.append(i)
        if i == 0:
            raise OSError("the first one")
        assert release.wait(PATIENCE_S)  # 1 and 2 keep both threads busy, so that 3 waits

    timer = threading.Timer(0.5, release.set)  # the map does not return before those that run have ended
    timer.start()
    with pytest.raises(OSError, match="the first one"):
        list(parallel_map(fail, range(1000), 2))
    timer.join()
    assert sorted(calls) in ([0, 1], [0, 1, 2])
