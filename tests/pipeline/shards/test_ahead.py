"""Values are made once, in the background, and given back when others take their place."""

import gc
import threading

import pytest

from pipeline.shards.ahead import Ahead


def test_values_are_made_once_and_in_the_background():
    made = []

    def square(key):
        made.append((key, threading.current_thread() is threading.main_thread()))
        return key * key

    ahead = Ahead(square, 4, lambda value: None)
    ahead.request([1, 2, 3])
    assert [ahead.get(key) for key in (3, 2, 1, 3)] == [9, 4, 1, 9]
    assert made == [(1, False), (2, False), (3, False)]


def test_what_was_asked_for_longest_ago_is_discarded_and_made_again():
    discarded = []
    ahead = Ahead(lambda key: key, 2, discarded.append)
    for key in (1, 2, 1, 3, 4):
        ahead.get(key)
    assert discarded == [2, 1]
    assert ahead.get(2) == 2
    assert discarded == [2, 1, 3]
    del ahead
    gc.collect()
    assert discarded == [2, 1, 3, 4, 2]


def test_what_is_dropped_while_it_is_made_is_discarded_then_and_what_has_not_begun_is_not_made():
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    made, discarded = [], []

    def make(key):
        made.append(key)
        if key == 1:
            begun.set()
            go_on.wait()
        return key

    ahead = Ahead(make, 2, lambda value: (discarded.append(value), ended.set()))
    ahead.request([1])
    begun.wait()
    ahead.request([2, 3, 4])
    assert discarded == []
    go_on.set()
    assert ahead.get(4) == 4
    ended.wait()
    assert made == [1, 3, 4]
    assert discarded == [1]


def test_an_error_is_raised_where_the_value_is_asked_for():
    discarded = []

    def fail(key):
        raise ValueError(f"no {key}")

    ahead = Ahead(fail, 1, discarded.append)
    ahead.request([1])
    with pytest.raises(ValueError, match="no 1"):
        ahead.get(1)
    with pytest.raises(ValueError, match="no 2"):
        ahead.get(2)
    assert discarded == []


def test_its_thread_has_ended_when_it_is_gone():
    # A thread that outlives the interpreter aborts the process when it drops an object of C++.
    before = set(threading.enumerate())
    ahead = Ahead(lambda key: key, capacity=2, discard=lambda value: None)
    assert ahead.get(1) == 1
    (thread,) = set(threading.enumerate()) - before
    del ahead
    assert not thread.is_alive()
