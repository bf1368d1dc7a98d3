"""The toy dataset with rejected samples."""

from pathlib import Path

import pytest
from support.toy import toy_config

from pipeline import pairs
from pipeline.generate import generate_pairs

REJECTED = {3, *range(16, 24)}
"""Of 40 samples in shards of eight: one, and a whole shard."""


def make_with_rejected(output: Path | str, folder: Path) -> None:
    """Make 40 pairs, of which those in REJECTED come out black and are not stored."""
    sample = pairs.sample_batch

    def sample_batch(teacher, spec, noises, condition, unconditional, ids):
        x0 = sample(teacher, spec, noises, condition, unconditional, ids)
        x0[[at for at, i in enumerate(ids) if i in REJECTED]] = -1
        return x0

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pairs, "sample_batch", sample_batch)
        generate_pairs(toy_config(output, folder, runtime={"max_rejected_fraction": 1.0}))
