"""Make the judge of the built-in teacher anew, from Fashion-MNIST.

    python stages/train_builtin_judge.py --config configs/builtin/judge.yaml --data DIR --output DIR

Run the same command again and it goes on from the last checkpoint, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.builtin_schema import BuiltinJudgeConfig
from configs.errors import exit_codes
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(BuiltinJudgeConfig, description=__doc__)
    from pipeline.builtin.judge import train_judge

    print(f"the judge is in {train_judge(config)}")


if __name__ == "__main__":
    with exit_codes():
        main()
