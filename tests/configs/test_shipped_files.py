"""Every configuration file that is shipped is a valid one."""

from pathlib import Path

import pytest

import configs
from configs.load import parse
from configs.schema import GeneratePairsConfig, PreparePromptsConfig

FOLDER = Path(configs.__file__).parent
FILES = sorted(FOLDER.rglob("*.yaml"))
MODELS = {"pairs.yaml": GeneratePairsConfig, "prompts.yaml": PreparePromptsConfig}


def test_there_are_some():
    assert FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(FOLDER)))
def test_a_shipped_file_is_valid(path):
    config = parse(MODELS[path.name], argv=["--config", str(path), "--output", "/somewhere"])
    assert config.output == "/somewhere"
