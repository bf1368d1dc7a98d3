"""How much of what a run should have learnt from gave no finite gradient: whether it still learns.

One lost update of a few is a large share and says nothing. So what the log lines count is added up until it is about
:data:`JUDGED_STEPS` steps or more, whatever ``runtime.log_every`` is, and judged then; after that counting begins anew.
"""

from collections.abc import Mapping

JUDGED_STEPS = 20
"""Fewer steps of the student are not judged: by the default limit of 5 %, one update of them may be lost."""


class NonfiniteShares:
    """Shares of several kinds of things, such as samples, over the same steps.

    Args:
        limit: the largest share that is no reason to stop, 0 to 1.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._steps = 0
        self._counts: dict[str, tuple[int, int]] = {}

    def add(self, steps: int, counts: Mapping[str, tuple[int, int]]) -> None:
        """Count ``steps`` steps, and of each kind of things in them how many were lost, and of how many."""
        self._steps += steps
        for name, (lost, number) in counts.items():
            before = self._counts.get(name, (0, 0))
            self._counts[name] = (before[0] + lost, before[1] + number)

    def judge(self) -> str | None:
        """What is lost too often and how often, in a few words; None if nothing is, or too few steps are counted."""
        if self._steps < JUDGED_STEPS:
            return None
        shares = {name: lost / number for name, (lost, number) in self._counts.items() if number}
        steps, self._steps, self._counts = self._steps, 0, {}
        worst = max(shares, key=shares.__getitem__, default=None)
        if worst is None or shares[worst] <= self._limit:
            return None
        return f"{shares[worst]:.1%} of the {worst} of the last {steps} steps"
