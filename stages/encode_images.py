"""Bring real images to one size and write them, or their latents, into WebDataset shards.

    ray job submit --working-dir . -- python stages/encode_images.py --config configs/cifar10/images.yaml \\
        --output /abs/dir

Run the same command again and it goes on where it stopped, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.encode_schema import EncodeImagesConfig
from configs.errors import exit_codes
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(EncodeImagesConfig, description=__doc__)
    from pipeline.images.encode import encode_images

    encode_images(config)


if __name__ == "__main__":
    with exit_codes():
        main()
