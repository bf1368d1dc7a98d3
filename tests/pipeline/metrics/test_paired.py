import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.metrics.paired import feature_cosine, pixel_distance


@given(level=st.integers(0, 255), other=st.integers(0, 255))
def test_plain_images_are_as_far_apart_as_their_grey_levels(level, other):
    images = np.full((2, 3, 4, 3), level, np.uint8), np.full((2, 3, 4, 3), other, np.uint8)
    assert pixel_distance(*images) == pytest.approx([abs(level - other) / 127.5] * 2, abs=1e-6)


def test_each_pair_counts_for_itself_and_squares_are_averaged():
    student, teacher = np.zeros((2, 2, 2, 3), np.uint8), np.zeros((2, 2, 2, 3), np.uint8)
    teacher[1, 0, 0, 0] = 255  # one of twelve numbers is off by 2
    assert pixel_distance(student, teacher) == pytest.approx([0, np.sqrt(4 / 12)])


def test_cosine_is_of_directions():
    a = np.array([[3, 0], [1, 1], [0, 2], [1, 0]], np.float32)
    b = np.array([[0.1, 0], [1, 0], [0, -5], [0, 1]], np.float32)
    assert feature_cosine(a, b) == pytest.approx([1, np.sqrt(0.5), -1, 0], abs=1e-6)


def test_what_is_not_paired_is_refused():
    with pytest.raises(ValueError, match="no pairs"):
        pixel_distance(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="no pairs"):
        feature_cosine(np.zeros((2, 4), np.float32), np.zeros((1, 4), np.float32))
