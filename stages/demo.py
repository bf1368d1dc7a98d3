"""The whole way in minutes, without a GPU or a network: pairs, a one-step student, an evaluation.

    python stages/demo.py --output /abs/dir

Everything it starts is stopped again, also after Ctrl-C. Run again: nothing is computed twice.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.demo_schema import DemoConfig
from configs.errors import exit_codes
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(DemoConfig, description=__doc__)
    from pipeline.demo import run_demo

    run_demo(config)


if __name__ == "__main__":
    with exit_codes():
        main()
