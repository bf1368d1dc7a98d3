"""Class labels in the place of prompts, for teachers that take a class instead of a text, or nothing at all.

A label is the decimal number of a class, from 0, and travels as any prompt does: in the prompt table, in the index, and
as the sample's ``.cls`` member. Where nobody lists labels, each is drawn uniformly, as a function of seed and row:

    label_r = BLAKE2b-64("{seed}/{r}/class"), little-endian, mod K

The label of a teacher without classes is the empty text. The table holds the draws, so its digest is in the fingerprint
of whatever was made with them, and a verification needs no recipe.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from configs.errors import UserError
from configs.schema import PromptsConfig
from pipeline.prompts import TableInfo, write_rows

CLASSES = "classes"
"""What ``prompts.path`` says to have labels drawn."""


def write_labels(
    path: Path, prompts: PromptsConfig, num_classes: int, seed: int, num_samples: int | None, per_prompt: int
) -> TableInfo:
    """Write a table with the label of every sample, to be used where ``prompts.path`` is CLASSES.

    Args:
        path: where to, ends in .parquet.
        prompts: what the user asked for; filters make no sense here.
        num_classes: K; 0 for a teacher without classes.
        seed: of the dataset.
        num_samples: in the dataset.
        per_prompt: samples that share a label.

    Raises:
        UserError: there is a filter, or no number of samples.
    """
    if filters := prompts.model_dump(exclude={"path", "column"}, exclude_defaults=True):
        raise UserError(f"prompts.{next(iter(filters))}: nothing is filtered where classes are drawn; leave it out")
    if num_samples is None:
        raise UserError("prompts.path: classes is no list that ends; say how many samples to make (num_samples)")
    return write_rows(path, draw_labels(num_classes, seed, -(-num_samples // per_prompt)), CLASSES)


def draw_labels(num_classes: int, seed: int, count: int) -> Iterator[str]:
    """The labels of rows 0 ... count - 1, for K = ``num_classes``; empty texts for K = 0."""
    for row in range(count):
        key = hashlib.blake2b(f"{seed}/{row}/class".encode(), digest_size=8).digest()
        yield str(int.from_bytes(key, "little") % num_classes) if num_classes else ""
