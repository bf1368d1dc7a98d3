from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scoring.zero_shot import chosen_captions, zero_shot_accuracy

GARMENTS, COLOURS = ("coat", "boot"), ("red", "teal", "grey")
CAPTIONS = list(product(GARMENTS, COLOURS))
PROPERTIES = {"garment": [garment for garment, _ in CAPTIONS], "colour": [colour for _, colour in CAPTIONS]}
FEATURES = np.eye(6, dtype=np.float32)


def test_each_property_is_right_or_wrong_by_itself():
    # A red coat is taken for a red coat, a teal coat for a red coat, a grey coat for a grey boot, a boot for a coat.
    truth = np.array([0, 1, 2, 3])
    chosen = FEATURES[[0, 0, 5, 1]]
    assert zero_shot_accuracy(chosen, FEATURES, truth, PROPERTIES) == {
        "accuracy": 0.25,
        "garment_accuracy": 0.5,
        "colour_accuracy": 0.5,
    }


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.01, 100))
def test_the_choice_is_the_highest_cosine_whatever_the_lengths(seed, scale):
    draws = np.random.default_rng(seed)
    images, captions = draws.standard_normal((5, 4)), draws.standard_normal((7, 4))
    cosines = [
        [image @ caption / np.linalg.norm(image) / np.linalg.norm(caption) for caption in captions] for image in images
    ]
    lengths = draws.uniform(0.1, 10, (7, 1))
    assert chosen_captions(images * scale, captions * lengths).tolist() == np.argmax(cosines, 1).tolist()


def test_chance_is_one_in_as_many_captions():
    draws = np.random.default_rng(0)
    images = draws.standard_normal((6000, 6)).astype(np.float32)
    found = zero_shot_accuracy(images, FEATURES, draws.integers(0, 6, 6000), PROPERTIES)
    for name, chance in (("accuracy", 1 / 6), ("garment_accuracy", 1 / 2), ("colour_accuracy", 1 / 3)):
        assert abs(found[name] - chance) < 4 * np.sqrt(chance * (1 - chance) / 6000)


def test_a_property_has_a_value_for_every_caption():
    with pytest.raises(ValueError, match="colour has 2 values for 6 captions"):
        zero_shot_accuracy(FEATURES, FEATURES, np.arange(6), {"colour": ["red", "teal"]})
