import threading

import pytest

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
    barrier = threading.Barrier(3, timeout=30)
    assert len(list(parallel_map(lambda _: barrier.wait(), range(3), 3))) == 3


def test_the_first_error_ends_it():
    calls = []

    def fail(i):
        calls.append(i)
        if i == 2:
            raise OSError("the third one")
        return i

    with pytest.raises(OSError, match="the third one"):
        list(parallel_map(fail, range(1000), 2))
    assert len(calls) <= 2 + 1 + 2 * 2
