"""Noise as a pure function of (seed, sample id).

    key   = blake2b-128("{seed}/{sample_id}" or "{seed}/{sample_id}/{stream}")
    noise = float16( Philox(key) -> standard normal, float32 )

Two properties follow, and everything downstream leans on them: a sample's noise does not depend on the worker, the
batch, the retry or the host that computes it; and the float16 value is *the* noise, so what is stored is exactly what
the sampler started from.

NumPy promises a bit generator's stream for ever, but not a distribution's (NEP 19). Hence the digest stored with
every sample, and :func:`check_noise_recipe`, which every process that makes or checks pairs calls before it starts.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from configs.schema import NOISE_RECIPE

KNOWN_ANSWER = "2c52957e6eec2496"
"""Digest of noise(0, 0..3, (1024,)), the same on NumPy 1.21 to 2.4."""


def noise(seed: int, sample_id: int, shape: Sequence[int], stream: str = "") -> NDArray[np.float16]:
    """Standard normal noise of one sample, rounded to float16.

    Args:
        seed: the dataset's seed, 0 <= seed < 2**63.
        sample_id: the sample's number in its dataset, >= 0.
        shape: shape of the result, without a batch dimension.
        stream: name of a further independent stream of the same sample (a stochastic sampler's step, say);
            empty for the noise the sampler starts from.

    Returns:
        Array of ``shape``, float16, mean 0, variance 1; rounded by at most 2**-11 of the value, or 2**-25.
    """
    name = f"{seed}/{sample_id}/{stream}" if stream else f"{seed}/{sample_id}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    generator = np.random.Generator(np.random.Philox(key=key))
    return generator.standard_normal(math.prod(shape), dtype=np.float32).astype(np.float16).reshape(shape)


def noise_digest(array: NDArray[np.float16]) -> str:
    """First 16 hex digits of the sha256 over the little-endian bytes of ``array``."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<f2").tobytes()).hexdigest()[:16]


def check_noise_recipe() -> None:
    """Raise RuntimeError when this NumPy derives other noise than the recipe ``philox-np-v1`` stands for."""
    digest = noise_digest(np.concatenate([noise(0, i, (1024,)) for i in range(4)]))
    if digest != KNOWN_ANSWER:
        raise RuntimeError(
            f"NumPy {np.__version__} gives other noise than {NOISE_RECIPE} ({digest}, expected {KNOWN_ANSWER}): "
            "pairs made with it would not match existing ones; install a NumPy within the bounds of pyproject.toml"
        )
