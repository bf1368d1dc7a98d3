"""Make a small EDM teacher, from Fashion-MNIST: OUTPUT/teacher, and OUTPUT/test_images to compare its students with.

    python stages/train_edm_teacher.py --config configs/edm_small/edm_teacher.yaml --data DIR --output DIR

Run the same command again and it goes on from the last checkpoint, or says that there is nothing left to do.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script's own folder is on the path, not the root

from configs.builtin_schema import SmallEdmTeacherConfig
from configs.errors import exit_codes
from configs.load import parse


def main() -> None:
    """Entry point."""
    config = parse(SmallEdmTeacherConfig, description=__doc__)
    from pipeline.builtin.edm_teacher import train_edm_teacher

    print(f"the teacher is in {train_edm_teacher(config)}")


if __name__ == "__main__":
    with exit_codes():
        main()
