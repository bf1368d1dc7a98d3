"""Normalise, filter and de-duplicate prompts into one Parquet table with stable ids.

    python stages/prepare_prompts.py --prompts.path captions.csv --prompts.column caption --output prompts.parquet

Prints what was read, dropped and kept. An output that holds these prompts already is left alone; any other is refused.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.schema import PreparePromptsConfig


def main() -> None:
    """Entry point."""
    config = parse(PreparePromptsConfig, description=__doc__)
    from pipeline.prompts import prepare_prompts

    print(prepare_prompts(config.prompts, config.output))


if __name__ == "__main__":
    with exit_codes():
        main()
