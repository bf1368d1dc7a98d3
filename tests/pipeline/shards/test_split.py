"""Selected samples are split in two: every one is held out or trained on, never both."""

import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.shards.layout import key
from pipeline.shards.selection import Selection
from pipeline.shards.split import Split

PER_SHARD = 7


def dataset(num_samples, rejected=()):
    """As much of a run and of commit records as a split looks at."""

    def sample_ids(shard):
        return range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, num_samples))

    commits = []
    for shard in range(-(-num_samples // PER_SHARD)):
        gone = [SimpleNamespace(key=key(i)) for i in sample_ids(shard) if i in rejected]
        commits.append(SimpleNamespace(shard=shard, rejected=gone, num_samples=len(sample_ids(shard)) - len(gone)))
    return SimpleNamespace(sample_ids=sample_ids), commits


def split(num_samples, rejected=(), selected=None, holdout=0):
    selection = None if selected is None else Selection(np.array(sorted(selected), np.int64), "digest")
    return Split("ROOT", *dataset(num_samples, rejected), selection, holdout)


@given(st.integers(1, 60), st.data())
def test_every_selected_sample_is_trained_on_or_held_out(num_samples, data):
    stored = data.draw(st.sets(st.integers(0, num_samples - 1), min_size=1))
    selected = data.draw(st.none() | st.sets(st.sampled_from(sorted(stored)), min_size=1))
    meant = sorted(stored if selected is None else selected)
    holdout = data.draw(st.integers(0, len(meant) - 1))
    found = split(num_samples, set(range(num_samples)) - stored, selected, holdout)
    training = [found.training(unit).tolist() for unit in range(len(found.sizes))]
    held_out = [sample_id for _, sample_id in found.held_out]
    assert [len(ids) for ids in training] == found.sizes
    assert sorted([*chain(*training), *held_out]) == meant
    assert held_out == [meant[(2 * i + 1) * len(meant) // (2 * holdout)] for i in range(holdout)]
    assert all(unit == sample_id // PER_SHARD for unit, sample_id in found.held_out)
    assert all(i // PER_SHARD == unit for unit, ids in enumerate(training) for i in ids)


def test_held_out_samples_are_evenly_spread():
    assert [i for _, i in split(40, holdout=4).held_out] == [5, 15, 25, 35]


@pytest.mark.parametrize("holdout", [10, 11])
def test_something_must_be_left(holdout):
    line = f"data.holdout: {holdout} pairs are to be held out of ROOT, which has 10 to choose from; lower it"
    with pytest.raises(UserError, match=re.escape(line)):
        split(20, selected=range(0, 20, 2), holdout=holdout)


@pytest.mark.parametrize(("rejected", "selected", "first"), [({3}, {2, 3, 4}, 3), ((), {19, 20, 25}, 20)])
def test_a_selection_of_samples_that_are_not_there_is_refused(rejected, selected, first):
    number = len(selected - (set(range(20)) - set(rejected)))
    line = f"data.selection: {number} of its samples are not in ROOT (the first is {key(first)})"
    with pytest.raises(UserError, match=re.escape(line)):
        split(20, rejected, selected)
