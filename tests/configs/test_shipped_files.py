"""Every configuration file that is shipped is a valid one."""

from pathlib import Path

import pytest

import configs
from configs.builtin_schema import BuiltinJudgeConfig, BuiltinTeacherConfig, SmallEdmTeacherConfig
from configs.encode_schema import EncodeImagesConfig
from configs.evaluate_schema import EvaluateConfig
from configs.load import parse
from configs.schema import GeneratePairsConfig, PreparePromptsConfig
from configs.score_schema import ScorePairsConfig
from configs.train_schema import TrainConfig

FOLDER = Path(configs.__file__).parent
FILES = sorted(FOLDER.rglob("*.yaml"))
MODELS = {
    "pairs": GeneratePairsConfig,
    "prompts": PreparePromptsConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "teacher": BuiltinTeacherConfig,
    "judge": BuiltinJudgeConfig,
    "edm": SmallEdmTeacherConfig,
    "images": EncodeImagesConfig,
    "score": ScorePairsConfig,
}
"""What a file is, by its name up to the first underscore."""
_FASHION = ["--data", "/data"]
NEEDED = {
    "pairs": ["--teacher.path", "/teacher"],
    "train": ["--data.pairs", "/pairs", "--teacher.path", "/teacher"],
    "teacher": _FASHION,
    "judge": _FASHION,
    "edm": _FASHION,
    "images": ["--source.path", "/images"],
    "evaluate": ["--teacher.path", "/teacher", "--prompts.path", "/prompts.txt", "--reference", "/real.npz"],
}
"""What a file leaves to the command line, besides the output."""


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_file_is_valid(path):
    kind = "train" if path.stem.startswith("v") else path.stem.partition("_")[0]  # v01 ... v12 are phases of a training
    needed = [] if path.parent.name == "toy" else NEEDED.get(kind, [])
    place = ["/somewhere"] if kind == "score" else ["--output", "/somewhere"]
    config = parse(MODELS[kind], argv=["--config", str(path), *place, *needed])
    assert str(config.root if kind == "score" else config.output) == "/somewhere"
