"""Say how far a pair dataset is.

    python stages/status.py /abs/dir

Reads the output only: needs no cluster, and may be asked while a run is going on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.schema import StatusConfig


def main() -> None:
    """Entry point."""
    config = parse(StatusConfig, description=__doc__)
    from pipeline.inspect_dataset import status

    status(config)


if __name__ == "__main__":
    with exit_codes():
        main()
