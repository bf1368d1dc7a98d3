"""Write which pairs of a dataset a training is to use, by an expression over their index and their scores.

    python stages/select_pairs.py ROOT --where "clip > 0.28" --limit 50000 --sample_seed 0 --output good.parquet

Prints how many remain and why the others went. No shard is touched: name the file as data.selection of a training.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.score_schema import SelectPairsConfig


def main() -> None:
    """Entry point."""
    config = parse(SelectPairsConfig, description=__doc__)
    from pipeline.selecting.select import select_pairs

    select_pairs(config)


if __name__ == "__main__":
    with exit_codes():
        main()
