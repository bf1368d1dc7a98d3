"""The order is a permutation an epoch, a function of its arguments, and the same for ever."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.shards.mixture import CYCLE, Mixture
from pipeline.shards.order import ShuffledOrder, permutation

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


def order(sizes, seed=0, window=3, name="n"):
    return ShuffledOrder(sizes, seed, window, name)


def rows(sizes):
    return sorted((unit, row) for unit, size in enumerate(sizes) for row in range(size))


def test_known_answer():
    assert permutation(10, "pairs/7/0").tolist() == [7, 9, 0, 1, 3, 4, 8, 6, 5, 2]
    found = order([3, 1, 4, 2], seed=7, window=2, name="pairs").locate(range(12))
    assert [f"{unit}.{row}" for unit, row in found] == "0.0 1.0 0.1 0.2 3.1 2.1 2.0 2.2 2.3 3.0 0.0 0.1".split()


@given(SIZES, st.integers(0, 2**63 - 1), st.integers(1, 15))
def test_every_row_comes_once_an_epoch(sizes, seed, window):
    shuffled, total = order(sizes, seed, window), sum(sizes)
    assert shuffled.num_rows == total
    for epoch in range(3):
        assert sorted(shuffled.locate(range(epoch * total, (epoch + 1) * total))) == rows(sizes)


@given(SIZES, st.integers(1, 15), st.data())
def test_it_depends_on_nothing_but_the_position(sizes, window, data):
    total = sum(sizes)
    whole = order(sizes, window=window).locate(range(3 * total))
    positions = data.draw(st.lists(st.integers(0, 3 * total - 1), max_size=20))
    assert order(sizes, window=window).locate(positions) == [whole[position] for position in positions]


@given(SIZES, st.integers(1, 15), st.integers(0, 300))
def test_a_window_is_read_to_its_end_before_the_next_and_both_are_announced(sizes, window, position):
    shuffled, total = order(sizes, window=window), sum(sizes)
    filled = sum(size > 0 for size in sizes)
    windows: list[tuple[int, set[int]]] = []  # stop, units
    start = position // total * total
    for _ in range(2):  # epochs
        for first in range(0, filled, window):
            members = set(shuffled.units_from(start)[: min(window, filled - first)])
            stop = start + sum(sizes[unit] for unit in members)
            assert {unit for unit, _ in shuffled.locate(range(start, stop))} == members
            windows.append((stop, members))
            start = stop
    at = next(number for number, (stop, _) in enumerate(windows) if position < stop)
    assert shuffled.units_from(position) == [
        *shuffled.units_from(windows[at][0] - 1)[: len(windows[at][1])],
        *shuffled.units_from(windows[at][0])[: len(windows[at + 1][1])],
    ]
    assert set(shuffled.units_from(position)) == windows[at][1] | windows[at + 1][1]


def test_epochs_seeds_and_names_differ():
    total = 64
    sizes = [8] * 8
    streams = [
        order(sizes).locate(range(total)),
        order(sizes).locate(range(total, 2 * total)),
        order(sizes, seed=1).locate(range(total)),
        order(sizes, name="m").locate(range(total)),
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < total // 4


def test_the_order_is_uniform():
    # 3 rows in one unit: each of the 6 orders comes in a sixth of the epochs; 6 sigma of 6000 throws is 173.
    shuffled = order([3])
    counts = Counter(tuple(shuffled.locate(range(3 * epoch, 3 * epoch + 3))) for epoch in range(6000))
    assert len(counts) == 6
    assert all(abs(count - 1000) < 173 for count in counts.values())


def test_memory_is_that_of_a_few_windows():
    shuffled = order([1000] * 1000, window=2)
    for position in range(0, 3_000_000, 9973):
        shuffled.locate([position])
    assert sum(len(window.rows) for window in shuffled._windows) <= 4 * 2 * 1000
    assert len(shuffled._epochs) <= 2


def test_no_rows_are_no_order():
    with pytest.raises(ValueError, match="no rows"):
        order([0, 0])


# ------------------------------------------------------------------------------------------------------------ mixture


WEIGHTS = st.lists(st.floats(0.01, 1), min_size=1, max_size=5)


@given(WEIGHTS, st.integers(0, 2**63 - 1))
def test_shares_are_exact_over_a_cycle(weights, seed):
    mixture = Mixture(weights, seed, "n")
    exact = CYCLE * np.array(weights) / np.sum(weights)
    for cycle in range(2):
        counts = Counter(source for source, _ in mixture.locate(range(cycle * CYCLE, (cycle + 1) * CYCLE)))
        assert counts.total() == CYCLE
        assert all(abs(counts[source] - share) < 1 for source, share in enumerate(exact))


def test_the_largest_remainder_gets_what_is_left():
    taken = Counter(source for source, _ in Mixture([3332, 3332, 3336], 0, "n").locate(range(CYCLE)))
    assert taken == {0: 333, 1: 333, 2: 334}


@given(WEIGHTS, st.integers(0, 2500))
def test_each_source_counts_up_without_a_gap(weights, start):
    mixture = Mixture(weights, 0, "n")
    following = mixture.before(start)
    for source, position in mixture.locate(range(start, start + 1500)):
        assert position == following[source]
        following[source] += 1
    assert following == mixture.before(start + 1500)


def test_cycles_seeds_and_names_differ_and_one_source_takes_all():
    streams = [
        [source for source, _ in mixture.locate(range(start, start + CYCLE))]
        for mixture, start in [
            (Mixture([1, 1], 0, "n"), 0),
            (Mixture([1, 1], 0, "n"), CYCLE),
            (Mixture([1, 1], 1, "n"), 0),
            (Mixture([1, 1], 0, "m"), 0),
        ]
    ]
    for i, one in enumerate(streams):
        for other in streams[:i]:
            assert 400 < sum(a == b for a, b in zip(one, other, strict=True)) < 600
    assert Mixture([3.0], 0, "n").locate(range(5000)) == [(0, position) for position in range(5000)]


def test_a_source_that_would_never_come_is_refused():
    with pytest.raises(UserError, match=r"^data.mix: weight 0\.1 of dataset 2 is less than a thousandth of all; raise"):
        Mixture([1000, 0.1], 0, "n")
