"""A worker whose shards are handed on, one by one, to others in the same process and on the same device.

    run(shard):  first.run(shard)  ->  follower.run(shard), for each follower

Two calls of ``run`` overlap (see :mod:`pipeline.executors`), so one shard is with the followers while the next is with
the first worker. A shard that is tried again because a follower failed is adopted by whoever has done with it: workers
find what exists.
"""

from collections.abc import Callable, Sequence
from typing import Generic

from pipeline.driver import Result, Worker

MakeFollower = Callable[[str, str], Worker[object]]
"""Builds a follower from URI and fingerprint of the dataset; picklable where workers are elsewhere."""


class FollowedWorker(Generic[Result]):
    """One worker and those that follow it. All are built one after the other, in the thread that asks for them.

    Args:
        make_first: builds the worker whose results count.
        make_followers: build the others.
    """

    def __init__(
        self, make_first: Callable[[], Worker[Result]], make_followers: Sequence[Callable[[], Worker[object]]]
    ) -> None:
        self._first = make_first()
        self._followers = [make_follower() for make_follower in make_followers]

    def run(self, shard: int, attempt: int) -> Result:
        """What the first worker makes of a shard, once the others have done with it. Raises as any of them."""
        result = self._first.run(shard, attempt)
        for follower in self._followers:
            follower.run(shard, attempt)
        return result
