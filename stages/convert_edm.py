"""Make an EDM teacher of a published checkpoint: NVIDIA's .pkl, or OpenAI's edm_imagenet64_ema.pt.

    python stages/convert_edm.py edm-cifar10-32x32-cond-vp.pkl --output /models/cifar10-cond

Pickles are programs. This one is read by a reader that runs nothing of it and takes tensors and plain arguments alone;
what asks for more is refused by its name. The folder holds config.json and model.safetensors.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.errors import exit_codes
from configs.load import parse
from configs.schema import ConvertEdmConfig


def main() -> None:
    """Entry point."""
    config = parse(ConvertEdmConfig, description=__doc__)
    from pipeline.teachers.edm.convert import convert

    found = convert(Path(config.source), Path(config.output))
    classes = f"{found.label_dim} classes" if found.label_dim else "unconditional"
    size = found.img_resolution
    print(f"{config.output}: {found.architecture}, {size}x{size}, {classes}")


if __name__ == "__main__":
    with exit_codes():
        main()
