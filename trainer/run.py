"""Distil a teacher into a one-step student by Distribution Matching Distillation.

    accelerate launch trainer/run.py --config configs/sd15/train.yaml --output RUN_DIR --data.pairs ROOT

Run the same command again and it goes on from the last checkpoint, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.train_schema import TrainConfig


def main() -> None:
    """Entry point."""
    config = parse(TrainConfig, description=__doc__)
    from trainer.loop import train

    train(config)


if __name__ == "__main__":
    with exit_codes():
        main()
