"""Whether the regression on pairs keeps a one-step student from dropping modes: eight Gaussians on a circle.

    python -m tests.benchmarks.modes [students]

Prints for each recipe, over ``students`` students (default 6), mean and worst of
    smallest          the smallest share of samples within 3 std of one mode; 0.124 for the data
    inside            the share within 3 std of any mode; 0.989 for the data
    total variation   of the modes' shares from 1/8
Some minutes on one core.
"""

import os
import sys
import time
from statistics import mean

os.environ["OMP_NUM_THREADS"] = "1"

from tests.support.toy_2d import Recipe, coverage, distil

RECIPES = {
    f"{name}, {steps} steps": Recipe(steps=steps, **entries)
    for name, entries in {
        "DM": {"regression_weight": 0},
        "DM, 5 critic steps": {"regression_weight": 0, "critic_steps": 5},
        "DM + regression 0.25": {"regression_weight": 0.25},
        "DM + regression 1": {},
        "regression": {"dm_weight": 0},
    }.items()
    for steps in (500, 2000)
}


def main(students: int) -> None:
    """Print the table, in Markdown."""
    print("| recipe | smallest: mean, worst | inside: mean, worst | total variation: mean, worst | s |")
    print("|---|---|---|---|---|")
    for name, recipe in RECIPES.items():
        started = time.perf_counter()
        found = coverage(distil(recipe, students), students)
        smallest, inside = [c.smallest for c in found], [c.inside for c in found]
        variation = [c.total_variation for c in found]
        print(
            f"| {name} | {mean(smallest):.3f}, {min(smallest):.3f} | {mean(inside):.3f}, {min(inside):.3f} "
            f"| {mean(variation):.3f}, {max(variation):.3f} | {time.perf_counter() - started:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ["6"]))
