"""Sample a teacher and write noise/image/prompt pairs into WebDataset shards.

    ray job submit --working-dir . -- python stages/generate_pairs.py --config configs/toy/pairs.yaml --output /abs/dir

Run the same command again and it goes on where it stopped, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.schema import GeneratePairsConfig


def main() -> None:
    """Entry point."""
    config = parse(GeneratePairsConfig, description=__doc__)
    from pipeline.generate import generate_pairs

    generate_pairs(config)


if __name__ == "__main__":
    with exit_codes():
        main()
