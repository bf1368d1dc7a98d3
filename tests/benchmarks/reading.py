"""Pairs a second through the reader, on one core with everything in the page cache.

python -m tests.benchmarks.reading
"""

import tempfile
import time
from pathlib import Path

import torch

from pipeline.shards.reader import PairReader
from tests.support.latents import write_latents

NUM_PAIRS = 2048
BATCH_SIZE = 64


def bench_reading(folder: Path) -> dict[str, float]:
    """4 x 64 x 64 latents in random order: first with every shard to be opened and hashed, then with all open."""
    torch.set_num_threads(1)
    root = folder / "latents"
    write_latents(root, folder, num_samples=NUM_PAIRS, samples_per_shard=256, shape=(4, 64, 64))
    reader = PairReader(
        str(root),
        seed=0,
        window=8,
        holdout=0,
        selection=None,
        cache_folder=folder,
        cache_bytes=0,
        allow_partial=False,
    )

    def epoch(number: int) -> float:
        started = time.perf_counter()
        for first in range(number * NUM_PAIRS, (number + 1) * NUM_PAIRS, BATCH_SIZE):
            reader.read(range(first, first + BATCH_SIZE))
        return NUM_PAIRS / (time.perf_counter() - started)

    first = epoch(0)
    return {"pairs/s, hashing every shard": first, "pairs/s, shards open": max(epoch(number) for number in range(1, 6))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in bench_reading(Path(temporary)).items():
            print(f"{name:<30} {value:>10,.0f}")
