"""Why there is a regression on pairs: without it a one-step student drops modes of the data.

Three students each, with an equal number of steps, by the losses of the trainer: see support/toy_2d.py. The reverse
divergence that distribution matching descends hardly minds a mode that the student never visits, and the fake score,
updated once for each update of the student, is always a little late. Measured over 12 students of each kind: without
pairs total variation is 0.07 to 0.47 and the rarest mode has at most 0.055 of the samples; with pairs 0.01 to 0.04, and
at least 0.074. ``python -m tests.benchmarks.modes`` has the other recipes.
"""

from statistics import mean

import pytest
import torch
from support.toy_2d import MODES, STD, Coverage, Recipe, circle, coverage, distil, pairs

STUDENTS = 3
HALF_A_SHARE = 1 / MODES / 2


@pytest.fixture(scope="module")
def with_pairs() -> list[Coverage]:
    return coverage(distil(Recipe(), STUDENTS), STUDENTS)


def test_the_teachers_pairs_are_spread_evenly_over_the_modes() -> None:
    """What the students are told, and that the measure can be met."""
    _, x0 = pairs(2000)
    distance, nearest = torch.cdist(x0.double(), circle().means).min(1)
    assert (distance <= 3 * STD).double().mean().item() == pytest.approx(0.989, abs=0.01)
    # Four standard deviations of a share among 2,000.
    assert (torch.bincount(nearest) / 2000 - 1 / MODES).abs().max().item() < 4 * (1 / MODES / 2000) ** 0.5


def test_with_pairs_every_mode_has_at_least_half_its_share(with_pairs: list[Coverage]) -> None:
    for student in with_pairs:
        assert student.smallest > HALF_A_SHARE
        assert student.inside > 0.7
        assert student.total_variation < 0.06


def test_without_pairs_modes_are_lost(with_pairs: list[Coverage]) -> None:
    without = coverage(distil(Recipe(regression_weight=0), STUDENTS), STUDENTS)
    assert mean(student.smallest for student in without) < HALF_A_SHARE
    unevenness = mean(student.total_variation for student in without)
    assert unevenness > 3 * mean(student.total_variation for student in with_pairs)


def test_pairs_alone_reach_every_mode_too() -> None:
    """In the plane the ODE's map is easily learnt, so it is not the regression that needs the other's help."""
    for student in coverage(distil(Recipe(dm_weight=0), STUDENTS), STUDENTS):
        assert student.smallest > HALF_A_SHARE
        assert student.total_variation < 0.06
