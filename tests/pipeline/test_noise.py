import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import noise as module
from pipeline.noise import check_noise_recipe, noise, noise_digest


def test_the_recipe_is_pinned_to_published_values():
    # Changing any of these changes the noise of every dataset that exists: raise NOISE_RECIPE instead.
    assert noise_digest(noise(0, 0, (4, 64, 64))) == "c867565b5196d314"
    assert noise_digest(noise(2**63 - 1, 999_999_999, (3, 32, 32))) == "cb7d5b1786992633"
    assert noise_digest(noise(0, 0, (4, 64, 64), stream="step3")) == "888f7f4ca93e249e"


def test_the_recipe_is_philox_keyed_by_blake2b():
    key = int.from_bytes(hashlib.blake2b(b"5/17", digest_size=16).digest(), "little")
    expected = np.random.Generator(np.random.Philox(key=key)).standard_normal(12, dtype=np.float32)
    np.testing.assert_array_equal(noise(5, 17, (3, 4)), expected.astype(np.float16).reshape(3, 4))


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**9 - 1), st.sampled_from(["", "step0", "step1"]))
def test_noise_is_a_function_of_its_arguments_alone(seed, sample_id, stream):
    first = noise(seed, sample_id, (2, 8), stream)
    noise(seed, sample_id + 1, (2, 8), stream)
    np.testing.assert_array_equal(first, noise(seed, sample_id, (2, 8), stream))


def test_samples_seeds_and_streams_are_independent():
    draws = [
        noise(seed, i, (4096,), stream) for seed in (0, 1) for i in (0, 1, 10) for stream in ("", "step0", "step1")
    ]
    correlation = np.corrcoef(np.stack(draws).astype(np.float64))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(4096)  # five standard deviations


def test_noise_is_standard_normal():
    values = np.concatenate([noise(3, i, (4096,)) for i in range(64)]).astype(np.float64)
    n = len(values)
    assert abs(values.mean()) < 5 / np.sqrt(n)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((values**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_a_numpy_with_another_stream_is_refused(monkeypatch):
    check_noise_recipe()
    monkeypatch.setattr(module, "noise", lambda seed, i, shape: noise(seed + 1, i, shape))
    with pytest.raises(RuntimeError, match="other noise than philox-np-v1"):
        check_noise_recipe()
