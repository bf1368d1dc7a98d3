"""How often an image is what its caption says, to a network that picks the best of all captions there are.

    chosen(image) = argmax over captions c of <f(image), g(c)> / (|f(image)| |g(c)|)

Captions that share a property (the same colour) form a class of it: an image is right in colour when the chosen
caption has the true one's, whatever else differs. With captions that are all combinations of their properties this is
zero-shot classification (Radford et al. 2021, section 3.1) without a further prompt.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def zero_shot_accuracy(
    image_features: NDArray[np.float32],
    caption_features: NDArray[np.float32],
    truth: NDArray[np.int64],
    properties: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Fraction of images whose chosen caption is right.

    Args:
        image_features: (N, D), of any length but zero, N at least 1.
        caption_features: (C, D), of the candidate captions, likewise.
        truth: (N,), index of each image's own caption.
        properties: property -> its value for each of the C captions, such as ``{"colour": ["red", "red", ...]}``.

    Returns:
        ``accuracy`` of the whole caption, and ``<property>_accuracy`` of each property, in [0, 1].
    """
    chosen = chosen_captions(image_features, caption_features)
    accuracies = {"accuracy": float(np.mean(chosen == truth))}
    for name, values in (properties or {}).items():
        if len(values) != len(caption_features):
            raise ValueError(f"{name} has {len(values)} values for {len(caption_features)} captions")
        of_caption = np.asarray(values)
        accuracies[f"{name}_accuracy"] = float(np.mean(of_caption[chosen] == of_caption[truth]))
    return accuracies


def chosen_captions(image_features: NDArray[np.float32], caption_features: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the caption most like each image, (N,); of equals the first."""
    captions = caption_features / np.linalg.norm(caption_features, axis=1, keepdims=True)
    return np.argmax(image_features @ captions.T, axis=1)  # an image's own length does not change its order
