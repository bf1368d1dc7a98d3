"""Measure the image of every pair of a dataset, and keep the values beside its shards.

    python stages/score_pairs.py ROOT --name clip

Run the same command again and it goes on where it stopped, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.score_schema import ScorePairsConfig


def main() -> None:
    """Entry point."""
    config = parse(ScorePairsConfig, description=__doc__)
    from pipeline.scoring.score_shards import score_pairs

    score_pairs(config)


if __name__ == "__main__":
    with exit_codes():
        main()
