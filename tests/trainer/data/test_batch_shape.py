"""How a step's samples are spread."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.train_schema import TrainConfig
from trainer.data.batch_shape import BatchShape, batch_shape


def config(dm=8, pairs=None, micro=None, dm_weight=1.0, regression_weight=1.0):
    return TrainConfig.model_validate(
        {
            "output": "run",
            "teacher": {"kind": "mixture"},
            "data": {"pairs": "/pairs"},
            "loss": {"dm_weight": dm_weight, "regression_weight": regression_weight, "regression": "l2"},
            "batch": {"dm": dm, "regression": pairs},
            "runtime": {"micro_batch": micro},
        }
    )


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_every_sample_of_a_step_is_in_one_micro_batch(world, accumulation, micro, pairs):
    shape = batch_shape(config(world * accumulation * micro, world * accumulation * pairs, micro), world)
    assert shape == BatchShape(micro, pairs, accumulation)


def test_without_a_micro_batch_nothing_is_accumulated():
    assert batch_shape(config(dm=8), world=2) == BatchShape(4, 4, 1)


def test_a_stream_that_is_not_used_takes_no_samples():
    assert batch_shape(config(dm=8, dm_weight=0, pairs=6), world=2) == BatchShape(0, 3, 1)
    assert batch_shape(config(dm=8, regression_weight=0), world=2) == BatchShape(4, 0, 1)


@pytest.mark.parametrize(
    ("settings", "world", "key"),
    [
        ({"dm": 9}, 2, "batch.dm"),
        ({"dm": 8, "micro": 3}, 1, "batch.dm"),
        ({"dm": 1}, 2, "batch.dm"),
        ({"dm": 8, "pairs": 6, "micro": 2}, 1, "batch.regression"),
    ],
)
def test_what_does_not_come_out_even_is_refused(settings, world, key):
    with pytest.raises(UserError, match=key):
        batch_shape(config(**settings), world)
