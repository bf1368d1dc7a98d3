"""Put several evaluations side by side on one page.

    python stages/compare.py EVAL_DIR EVAL_DIR --output DIR

They must agree on what their numbers depend on: prompts, noise, features, reference. Reads their reports only.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.evaluate_schema import CompareConfig
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(CompareConfig, description=__doc__)
    from pipeline.evaluation.compare import compare

    compare(config)


if __name__ == "__main__":
    with exit_codes():
        main()
