"""What is killed in a run of pair generation, and when: a function of a seed."""

import random
from dataclasses import dataclass
from enum import StrEnum


class Victim(StrEnum):
    """What is killed with -9."""

    ACTOR = "actor"
    RAYLET = "raylet"
    NODE = "node"
    DRIVER = "driver"
    HEAD = "head"


@dataclass(frozen=True)
class Fault:
    """One kill.

    Attributes:
        victim: what is killed.
        commits: it is due when so many shards are committed, 0: when a driver has been started, ...
        delay_s: ... and so many seconds later.
    """

    victim: Victim
    commits: int
    delay_s: float


_FIRST = (Victim.DRIVER, Victim.ACTOR, Victim.NODE, Victim.DRIVER, Victim.RAYLET, Victim.HEAD)
"""By seed, so that any six seeds in a row have every victim."""
_LONGEST_START_S = 12.0
_LONGEST_SHARD_S = 0.6


def schedule(seed: int, num_shards: int) -> list[Fault]:
    """One to three kills of a run of ``num_shards``, in the order of their moments.

    One in six comes while a driver starts (configuration, Ray, lease, prompt table, actors), one in six after the last
    commit, while manifest, card and seal are written; the others between any two commits.
    """
    rng = random.Random(seed)
    victims = [_FIRST[seed % len(_FIRST)]]
    victims += rng.choices([Victim.ACTOR, Victim.DRIVER, Victim.NODE, Victim.RAYLET], k=rng.randrange(3))
    return sorted((_fault(rng, victim, num_shards) for victim in victims), key=lambda fault: fault.commits)


def _fault(rng: random.Random, victim: Victim, num_shards: int) -> Fault:
    match rng.randrange(6):
        case 0 if victim is not Victim.ACTOR:  # there is none yet
            return Fault(victim, 0, rng.uniform(0.0, _LONGEST_START_S))
        case 1 if victim is Victim.DRIVER:  # there is nobody else left to disturb
            return Fault(victim, num_shards, rng.uniform(0.0, _LONGEST_SHARD_S))
        case _:
            return Fault(victim, rng.randrange(1, num_shards), rng.uniform(0.0, _LONGEST_SHARD_S))
