"""Measure a student beside its teacher: images from the same noises and prompts, then numbers, plots and one page.

    python stages/evaluate.py --config configs/builtin/evaluate.yaml --student RUN_DIR --output EVAL_DIR

Run the same command again and it goes on where it stopped, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.evaluate_schema import EvaluateConfig
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(EvaluateConfig, description=__doc__)
    from pipeline.evaluation.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    with exit_codes():
        main()
