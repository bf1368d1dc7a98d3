"""How different several images of one prompt are: a generator that has collapsed gives one image for every noise.

    diversity of a prompt = mean over pairs i < j of its images of 1 - <f_i, f_j>,  f of unit length:  in [0, 2]

With s the sum of the n unit vectors, sum over i != j of <f_i, f_j> = |s|^2 - n, so no pair is formed:

    diversity = (n^2 - |s|^2) / (n (n - 1))
"""

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError


def prompt_diversity(features: NDArray[np.float32], prompt_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean pairwise cosine distance within each prompt. The mean of these is the diversity of a set.

    Args:
        features: (N, D), of any length but zero.
        prompt_ids: (N,), equal for images of one prompt, in any order.

    Returns:
        (P,), one for each prompt with at least two images, in order of prompt id.

    Raises:
        UserError: no prompt has two images.
    """
    prompts, group, counts = np.unique(prompt_ids, return_inverse=True, return_counts=True)
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    sums = np.zeros((len(prompts), features.shape[1]))
    np.add.at(sums, group, unit)
    several = counts > 1
    if not several.any():
        raise UserError("diversity needs several images of one prompt; set images_per_prompt to 2 or more")
    n = counts[several]
    return (n**2 - np.square(sums[several]).sum(1)) / (n * (n - 1))
