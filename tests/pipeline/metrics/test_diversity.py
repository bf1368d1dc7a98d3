from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from pipeline.metrics.diversity import prompt_diversity


@given(prompt_ids=st.lists(st.integers(0, 4), min_size=6, max_size=20), seed=st.integers(0, 2**32 - 1))
def test_it_is_the_mean_over_all_pairs(prompt_ids, seed):
    ids = np.array(prompt_ids)
    features = np.random.default_rng(seed).standard_normal((len(ids), 5)).astype(np.float32)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = []
    for prompt in sorted(set(prompt_ids)):
        rows = unit[ids == prompt]
        if len(rows) > 1:
            expected.append(np.mean([1 - a @ b for a, b in combinations(rows, 2)]))
    assert prompt_diversity(features, ids) == pytest.approx(expected, abs=1e-5)


def test_equal_images_have_none_opposite_ones_two_and_right_angles_one():
    features = np.array([[1, 0], [5, 0], [1, 0], [-3, 0], [1, 0], [0, 2]], np.float32)
    assert prompt_diversity(features, np.array([0, 0, 1, 1, 2, 2])) == pytest.approx([0, 2, 1], abs=1e-9)


def test_one_image_a_prompt_says_nothing():
    with pytest.raises(UserError, match="several images of one prompt"):
        prompt_diversity(np.eye(3, dtype=np.float32), np.arange(3))
