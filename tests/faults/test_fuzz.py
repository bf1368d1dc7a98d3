"""The fuzzer in a small form; ``python tests/faults/fuzz.py`` is the long one."""

import pytest

from tests.faults.fuzz import TARGETS, run

ROUNDS = {"configs": 20, "records": 6, "tars": 6, "index": 6, "manifest": 3, "teacher": 4}
"""Fewer where a round takes long."""


@pytest.mark.parametrize("target", TARGETS)
def test_hostile_files_are_taken_or_refused_in_a_line(target):
    outcomes = [run(target, number) for number in range(ROUNDS.get(target, 25))]
    assert "refused" in outcomes
