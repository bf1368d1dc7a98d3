"""Every configuration file that is shipped is a valid one."""

from pathlib import Path

import pytest

import configs
from configs.builtin_schema import BuiltinJudgeConfig, BuiltinTeacherConfig, SmallEdmTeacherConfig
from configs.evaluate_schema import EvaluateConfig
from configs.load import parse
from configs.schema import GeneratePairsConfig, PreparePromptsConfig
from configs.train_schema import TrainConfig

FOLDER = Path(configs.__file__).parent
FILES = sorted(FOLDER.rglob("*.yaml"))
MODELS = {
    "pairs.yaml": GeneratePairsConfig,
    "prompts.yaml": PreparePromptsConfig,
    "train.yaml": TrainConfig,
    "evaluate.yaml": EvaluateConfig,
    "teacher.yaml": BuiltinTeacherConfig,
    "judge.yaml": BuiltinJudgeConfig,
    "edm_teacher.yaml": SmallEdmTeacherConfig,
}
_FASHION = ["--data", "/data"]
NEEDED = {
    "train.yaml": ["--data.pairs", "/pairs"],
    "teacher.yaml": _FASHION,
    "judge.yaml": _FASHION,
    "edm_teacher.yaml": _FASHION,
    "evaluate.yaml": ["--teacher.path", "/teacher", "--prompts.path", "/prompts.txt", "--reference", "/real.npz"],
}
"""What a file leaves to the command line, besides the output."""


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_file_is_valid(path):
    config = parse(
        MODELS[path.name], argv=["--config", str(path), "--output", "/somewhere", *NEEDED.get(path.name, [])]
    )
    assert str(config.output) == "/somewhere"
