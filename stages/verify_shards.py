"""Check a pair dataset: hashes, counts, index, noise, prompts, and with --deep the teacher itself.

    python stages/verify_shards.py /abs/dir --deep 16

Needs no cluster. Exit code 0: everything that exists is whole; 1: something is damaged; 2: this is no dataset.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.schema import VerifyShardsConfig


def main() -> None:
    """Entry point."""
    config = parse(VerifyShardsConfig, description=__doc__)
    from pipeline.inspect_dataset import verify_shards

    verify_shards(config)


if __name__ == "__main__":
    with exit_codes():
        main()
