"""Random generators derived from (seed, purpose, step), so that any step of any training can be made again."""

import hashlib

import torch


def generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator on the CPU, whatever the device of the training: the draws are the same on every machine."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
