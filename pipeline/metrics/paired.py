"""How far a student's images are from the teacher's for the same noise and prompt: what only pairs can tell.

    pixel distance    sqrt( mean over pixels and channels of (student - teacher)^2 ),  black -1, white 1:  in [0, 2]
    feature cosine    <f, g> / (|f| |g|),  f and g the features of the two images:                        in [-1, 1]

A student that matches the teacher's distribution need not match its pairs; the distance says how far it does, on pairs
that it was not trained on.
"""

import numpy as np
from numpy.typing import NDArray


def pixel_distance(student: NDArray[np.uint8], teacher: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Root mean square difference of each pair.

    Args:
        student: images, (B, H, W, 3), 0 black to 255 white.
        teacher: the teacher's for the same noises and prompts, same shape.

    Returns:
        (B,), float32.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"images of shape {student.shape} and {teacher.shape} are no pairs")
    difference = (student.astype(np.float32) - teacher.astype(np.float32)) / 127.5
    return np.sqrt(np.square(difference).reshape(len(student), -1).mean(1))


def feature_cosine(student: NDArray[np.float32], teacher: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine similarity of each pair's features.

    Args:
        student: (B, D).
        teacher: (B, D).

    Returns:
        (B,), float32.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"features of shape {student.shape} and {teacher.shape} are no pairs")
    lengths = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    return (student * teacher).sum(1) / lengths
