"""Randomness derived from what it is for.

    key = blake2b-64(seed / purpose / step / turn / micro-batch)  ->  a generator of its own

So a run that was killed draws what it would have drawn, and nothing that draws, however often, changes what others get.
``micro_batch`` is the number among all processes (accumulation step * processes + rank): two processes draw what one
process with twice the accumulation draws. The global generator is neither read nor set.
"""

import hashlib

import torch


def derived_generator(
    device: torch.device, seed: int, purpose: str, step: int, turn: int, micro_batch: int
) -> torch.Generator:
    """A generator for one purpose within one micro-batch.

    Args:
        device: where its numbers are made; a CPU's and a GPU's differ.
        seed: of the run.
        purpose: what it is for.
        step: number of the student's step, from 0.
        turn: number of the turn within the step: 0 is the student's and the first of the fake score, and so on.
        micro_batch: number within the turn, over all processes.
    """
    name = f"{seed}/{purpose}/{step}/{turn}/{micro_batch}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return torch.Generator(device).manual_seed(key)
